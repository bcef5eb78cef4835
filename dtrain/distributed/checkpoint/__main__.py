"""`python -m dtrain.distributed.checkpoint verify|ls|convert`: look at checkpoints from a shell.

Exit codes: 0; 1 for a checkpoint that is damaged or cannot be read, with one line that says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dtrain.distributed.checkpoint import _manifest, format_utils
from dtrain.distributed.checkpoint.api import CheckpointException, DamagedCheckpoint
from dtrain.distributed.checkpoint.metadata import TensorStorageMetadata


def verify(args: argparse.Namespace) -> None:
    """Read every byte of checkpoints and compare it with their manifests."""
    for folder in args.folders:
        whole = format_utils.Whole(folder)
        files = whole.metadata.storage_data["files"].values()
        total = sum(file["size"] for file in files)
        print(f"{folder}: {len(whole.tensors)} tensors, {total:,} bytes in {len(files)} files, ok")


def ls(args: argparse.Namespace) -> None:
    """List what a checkpoint has, from its manifest alone."""
    metadata = _manifest.read(Path(args.folder))
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            kind, shape = entry.properties.dtype.name, list(entry.size)
            print(f"{name}  {kind}{shape}  {len(entry.chunks)} chunks")
        else:
            print(f"{name}  {metadata.storage_data['values'][name]}")


_CONVERSIONS: dict[tuple[str, str], Callable[[str, str], None]] = {
    ("", ".safetensors"): format_utils.dcp_to_safetensors,
    ("", ".pt"): format_utils.dcp_to_torch_save,
    (".safetensors", ""): format_utils.safetensors_to_dcp,
    (".pt", ""): format_utils.torch_save_to_dcp,
}


def convert(args: argparse.Namespace) -> None:
    """A checkpoint to one file, or one file to a checkpoint."""
    kinds = _kind(args.source, Path(args.source).is_dir()), _kind(args.target, False)
    if kinds not in _CONVERSIONS:
        raise ValueError(
            f"from {args.source} to {args.target}: one is a checkpoint's folder, the other a file "
            "that ends in .safetensors, .pt or .pth"
        )
    _CONVERSIONS[kinds](args.source, args.target)


def _kind(path: str, is_folder: bool) -> str:
    suffix = Path(path).suffix
    if is_folder or suffix not in (".safetensors", ".pt", ".pth"):
        return ""
    return ".pt" if suffix == ".pth" else suffix


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dtrain.distributed.checkpoint")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("verify", help=verify.__doc__)
    command.add_argument("folders", nargs="+", metavar="DIR")
    command.set_defaults(run=verify)
    command = commands.add_parser("ls", help=ls.__doc__)
    command.add_argument("folder", metavar="DIR")
    command.set_defaults(run=ls)
    command = commands.add_parser("convert", help=convert.__doc__)
    command.add_argument("source")
    command.add_argument("target", help="a folder, or FILE.safetensors, FILE.pt, FILE.pth")
    command.set_defaults(run=convert)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (DamagedCheckpoint, CheckpointException, OSError, ValueError, TypeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
