"""Prepare a stock data set of tfds in the file format that is read here.

python -m cpnas_jax.data.prepare NAME [--data_dir=DIR] [--manual_dir=DIR] [--overwrite]

  NAME          such as cifar10 or imagenet2012; name/config where a set has configurations
  --data_dir    where prepared sets are kept; TFDS_DATA_DIR or tfds's default if not given
  --manual_dir  archives that were downloaded by hand: those of ImageNet, or any others under
                their original names, which are then not downloaded
  --overwrite   replace what is prepared there, such as another file format

This alone needs TensorFlow (the extra `prepare`). The command of tfds itself, `tfds build`, also
needs apache_beam since 4.9.10, even for sets that do not use it.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from cpnas_jax.data import records
from cpnas_jax.runtime.errors import UserError
from cpnas_jax.runtime.paths import user_path


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> str:
    """Download, unless the archives are in `manual_dir`, and prepare a set as array_record.

    Args:
        name: name of a stock set of tfds.
        data_dir: where tfds keeps prepared sets; None for TFDS_DATA_DIR or tfds's default.
        manual_dir: directory of archives under their original names; None for
            `<data_dir>/downloads/manual`.
        overwrite: whether to replace a version that is prepared already.

    Returns:
        The directory of the prepared version.

    Raises:
        UserError: TensorFlow is not installed, tfds has no such set, or its archives cannot be had
            or are not the original ones.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError(
            'preparing a data set needs TensorFlow: pip install -e ".[prepare]"; reading it '
            "does not"
        )
    import tensorflow_datasets as tfds

    root = records.resolve_data_dir(data_dir)
    builder_class = records.stock_builder_class(name)
    if builder_class is None:
        raise UserError(f"{name!r} is no data set of tensorflow_datasets {tfds.__version__}")
    manual = user_path("--manual_dir", manual_dir) if manual_dir else None
    mode = tfds.GenerateMode
    options = tfds.download.DownloadConfig(
        manual_dir=None if manual is None else os.fspath(manual),
        download_mode=mode.REUSE_CACHE_IF_EXISTS if overwrite else mode.REUSE_DATASET_IF_EXISTS,
        try_download_gcs=False,
    )
    try:
        builder = tfds.builder(name, data_dir=os.fspath(root))
        builder.download_and_prepare(
            download_dir=os.fspath(root / "downloads"),
            download_config=options,
            file_format="array_record",
        )
    # Each builder has its own ways of failing on archives that are missing or not its own.
    except Exception as error:
        raise UserError(_failure(name, builder_class, error)) from error
    return os.fspath(builder.data_path)


def _failure(name: str, builder_class: Any, error: Exception) -> str:
    """Return what to tell a user whose set could not be prepared."""
    by_hand = records.manual_instructions(name)
    urls = (builder_class.url_infos or {}).values()
    archives = [info.filename for info in urls if info.filename]
    if by_hand:
        advice = f"it has to be downloaded by hand, for --manual_dir: {by_hand}"
    elif archives:
        advice = (
            "without a network, give the directory of its original archives by --manual_dir: "
            f"{', '.join(archives[:4])}{', ...' if len(archives) > 4 else ''}"
        )
    else:
        advice = "see its page in the catalogue of tensorflow_datasets"
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{name} cannot be prepared ({reason[:300]}); {advice}"


def main(arguments: Sequence[str]) -> int:
    """Prepare the set that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cpnas_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--data_dir", metavar="DIR")
    parser.add_argument("--manual_dir", metavar="DIR")
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_args(arguments)
    try:
        print(prepare(given.name, given.data_dir, given.manual_dir, given.overwrite))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command starts again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
