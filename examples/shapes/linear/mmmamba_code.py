"""The code of this model is that of the package `mmmamba`, which must be installed."""

from mmmamba.configuration_mmmamba import MmMambaConfig
from mmmamba.image_processing_mmmamba import MmMambaImageProcessor, MmMambaImageProcessorPil
from mmmamba.modeling_mmmamba import MmMambaForConditionalGeneration
from mmmamba.processing_mmmamba import MmMambaProcessor
from mmmamba.tokenization_mmmamba import MmMambaTextTokenizer, MmMambaTokenizer, MmMambaTokenizerFast
from mmmamba.video_processing_mmmamba import MmMambaVideoProcessor
