"""mmMamba: a decoder-only multimodal language model of Mamba-2 and attention layers."""
