"""Reading and writing safetensors one tensor at a time, so that a model never has to fit in memory."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor


# By their names in safetensors files. Quantised and integer weights are not read; `mmmamba quantize` writes them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint8: "U8"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SLICE = 1 << 24  # elements that `is_finite` checks at once


class ShardReader:
    """The tensors of a checkpoint folder: one safetensors file, several, or shards with an index.

    Attributes:
        specs: Name to a tensor on the meta device with the stored shape and dtype.

    Raises:
        ValueError: if the folder holds no safetensors (pickles are refused), a file cannot be read, the index and
            the files disagree, or a dtype is not a plain floating point one.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._file_of: dict[str, Path] = {}
        self.specs: dict[str, Tensor] = {}
        index = None
        index_path = self.folder / "model.safetensors.index.json"
        if index_path.exists():
            index = read_index(index_path)
            files = sorted({self.folder / name for name in index.values()})
            if absent := [file.name for file in files if not file.is_file()]:
                raise ValueError(f"{index_path} names {listed(absent)}, which is not there; download it again.")
        else:
            single = self.folder / "model.safetensors"
            files = [single] if single.is_file() else sorted(self.folder.glob("*.safetensors"))
            files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(self._no_weights())
        for file in files:
            self._read_header(file)
        if index is not None and (differing := sorted(set(index) ^ set(self.specs))):
            raise ValueError(
                f"{index_path} and its shards disagree about {listed(differing)}; download the folder again."
            )

    def _no_weights(self) -> str:
        pickles = sorted(file.name for file in self.folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            return (
                f"{self.folder} holds its weights as {listed(pickles)}, a pickle: loading one can run any code, so "
                "only safetensors are read; save the model with safetensors first."
            )
        return f"{self.folder} holds no *.safetensors file; give a folder with config.json and weights."

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():
                    entry = handle.get_slice(name)
                    dtype = DTYPES.get(entry.get_dtype())
                    if dtype is None:
                        raise ValueError(
                            f"{printable(name)} in {file.name} has dtype {entry.get_dtype()}; only "
                            f"{', '.join(DTYPES)} can be converted, so give unquantised weights."
                        )
                    if name in self.specs:
                        raise ValueError(
                            f"{printable(name)} is in both {self._file_of[name].name} and {file.name}; keep one of "
                            "them."
                        )
                    try:
                        self.specs[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
                    except (RuntimeError, TypeError, OverflowError):
                        raise ValueError(
                            f"{printable(name)} in {file.name} has the impossible shape {entry.get_shape()}; download "
                            "the file again."
                        ) from None
                    self._file_of[name] = file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}); download it again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def __getitem__(self, name: str) -> Tensor:
        # A new handle each time: while a file is mapped, the pages that were read count as this process's memory.
        with safe_open(self._file_of[name], "pt") as handle:
            return handle.get_tensor(name)


class ShardWriter:
    """Writes tensors, in any order, into safetensors shards planned beforehand from shapes and dtypes.

    Args:
        folder: An existing folder.
        specs: Name to a tensor (on any device, meta included) with the shape and dtype to come.
        max_shard_size: Largest size of one file.

    Raises:
        ValueError: on leaving the context, if a planned tensor was not written.
    """

    def __init__(self, folder: Path, specs: Mapping[str, Tensor], max_shard_size: int | str = "5GB"):
        self.specs = {name: torch.empty_like(spec, device="meta") for name, spec in specs.items()}
        self.split = split_torch_state_dict_into_shards(
            self.specs, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self._folder = Path(folder)
        self._files = {}
        self._offsets = {}
        self._unwritten = set(self.specs)

    def __enter__(self):
        for filename, names in self.split.filename_to_tensors.items():
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                spec = self.specs[name]
                start, end = end, end + spec.numel() * spec.element_size()
                header[name] = {
                    "dtype": _NAMES[spec.dtype],
                    "shape": list(spec.shape),
                    "data_offsets": [start, end],
                }
            encoded = json.dumps(header).encode()
            encoded += b" " * (-len(encoded) % 8)  # data must begin at a multiple of eight bytes
            file = self._files[filename] = (self._folder / filename).open("wb")
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            data = file.tell()
            file.truncate(data + end)
            self._offsets |= {name: (file, data + header[name]["data_offsets"][0]) for name in names}
        if self.split.is_sharded:
            index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
            write_json(self._folder / "model.safetensors.index.json", index)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Stores one tensor; its shape and dtype must be the planned ones (ValueError)."""
        spec = self.specs[name]
        if (tensor.shape, tensor.dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{name} was planned as {tuple(spec.shape)} {spec.dtype} but is {tuple(tensor.shape)} {tensor.dtype}."
            )
        file, position = self._offsets[name]
        file.seek(position)
        if tensor.numel():
            file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        self._unwritten.discard(name)

    def __exit__(self, kind, error, traceback):
        for file in self._files.values():
            file.close()
        if error is None and self._unwritten:
            raise ValueError(f"{listed(sorted(self._unwritten))} was planned but never written.")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; checked in slices, as `isfinite` allocates a tensor, too."""
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_SLICE))


def listed(names: list[str], most: int = 8) -> str:
    """Names for an error message, at most `most` of them and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def printable(text: str) -> str:
    """Text with control characters, and whatever else moves or colours a terminal, as escapes such as `\\x1b`."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises ValueError if it is missing or no JSON object."""
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
        raise ValueError(f"{path} is no regular file; put the file in its place.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a model folder with a {path.name}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__} where a JSON object is expected; download it again.")
    return value


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard, from an index of shards; each shard is a file in the index's folder.

    Raises:
        ValueError: if it is missing, no such table, or names files elsewhere.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} has no weight_map, a table of tensors and files; download it again.")
    for tensor, name in index.items():
        is_plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable()
        if not is_plain or Path(name).name != name or "\\" in name:
            raise ValueError(
                f"{path} says that {printable(tensor)} is in {name!r:.200}, which is no plain name of a .safetensors "
                "file in this folder; download it again."
            )
    return index


def write_json(path: Path, value: dict) -> None:
    """Writes JSON the way Transformers does: two spaces, sorted keys, a final newline. See `write_text`."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file at once: whoever reads it, after a kill too, finds the old text or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
