"""`rankgrpo data`: check, import and demo. Heavy imports wait until a command needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from rankgrpo.errors import ConfigError
from rankgrpo.files.options import check_least

Data = Annotated[str, arg(help="`demo`, or a folder with train/validation/test.jsonl and catalog.jsonl or .csv")]

data_app = tyro.extras.SubcommandApp()


@dataclass(frozen=True)
class LogArgs:
    """Options of --format interactions; `item` is also that of a table."""

    item: Annotated[str, arg(help="how an item is written, from columns of the catalog (data.item)")] = (
        "{title} ({year})"
    )
    num_history: Annotated[int, arg(help="items of the history that the conversation names, the latest last")] = 10
    num_next: Annotated[int, arg(help="how many of the next items are right")] = 1
    num_cuts: Annotated[int, arg(help="training samples of a user, the latest")] = 5
    split: Annotated[
        Literal["last", "time"], arg(help="last: everybody's last items are the test; time: what came after a moment")
    ] = "last"
    core: Annotated[int, arg(help="leave out users and items with fewer interactions; 0 keeps all")] = 0
    min_rating: Annotated[float | None, arg(help="leave out what was rated lower")] = None
    drop_unknown: Annotated[bool, arg(help="leave out items that the item table lacks, in place of an error")] = False
    sentence: Annotated[str, arg(help="what the user says; {items} are the items")] = "I chose {items}. What next?"


@data_app.command
def check(
    path: Positional[Data] = "demo",
    *,
    item: Annotated[
        str, arg(help="how an item is written, from columns of the catalog (data.item)")
    ] = "{title} ({year})",
    num_train: Annotated[int, arg(help="training samples used; 0 is all")] = 0,
    tokenizer: Annotated[
        str, arg(help="folder or hub id whose tokenizer the catalog is shown under as a trie; tiny makes its own")
    ] = "tiny",
) -> None:
    """Health report of a data set: problems by file and line, counts, lengths, ground truth in the catalog, baselines.

    Try:
      rankgrpo data check path/to/redial
      rankgrpo data check path/to/books --item '{title} by {author}'
      rankgrpo data check path/to/redial --tokenizer Qwen/Qwen2.5-0.5B-Instruct
    """
    from rankgrpo.data.load import load_dataset
    from rankgrpo.evaluation.health import check_dataset
    from rankgrpo.items.format import ItemFormat
    from rankgrpo.model.presets import open_tokenizer

    check_least(0, num_train=num_train)
    dataset = load_dataset(path, num_train=num_train or None, item_format=ItemFormat(item))
    print(check_dataset(dataset, tokenizer=open_tokenizer(tokenizer, dataset)))


@data_app.command(name="import")
def import_(
    source: Positional[Annotated[str, arg(help="file or folder; or, with --sha256, a URL of a file")]],
    out: Positional[Annotated[Path, arg(help="data set folder to write; must not exist")]],
    *,
    format: Annotated[
        Literal["auto", "redial", "saved", "table", "interactions"],
        arg(
            help="redial: the official archive or its files; saved: save_to_disk folders; table: a sample a row of "
            "JSONL, JSON, CSV or parquet; interactions: a log of who chose what, or rows with a history"
        ),
    ] = "auto",
    catalog: Annotated[
        Path | None, arg(help="catalog as .jsonl, .csv or .pkl (default: the source's, else its ground truth's films)")
    ] = None,
    columns: Annotated[
        list[str], arg(metavar="FIELD=COLUMN", help="columns of a table, for example conversation=dialog id=key")
    ] = [],  # noqa: B006
    groundtruth: Annotated[
        Literal["named", "accepted", "liked", "unseen"],
        arg(help="ReDial: all films the recommender names, or by the forms: not rejected, liked, not seen"),
    ] = "accepted",
    validation_frac: Annotated[float, arg(help="share of the conversations for a missing validation split")] = 0.1,
    test_frac: Annotated[float, arg(help="the same for a missing test split")] = 0.1,
    seed: Annotated[int, arg(help="of the drawn splits")] = 0,
    sha256: Annotated[str | None, arg(help="checksum of the file at a URL, which is kept beside the output")] = None,
    log: OmitArgPrefixes[LogArgs] = LogArgs(),  # noqa: B008  (frozen)
) -> None:
    """Turn a data set as it is into a data set folder: ReDial, the released Reddit-v2, tables, logs of interactions.

    Try:
      rankgrpo data import redial_dataset.zip data/redial
      rankgrpo data import processed_datasets data/reddit --catalog gt_catalog.pkl
      rankgrpo data import dialogs.csv data/mine --columns conversation=dialog groundtruth=liked --catalog films.csv
      rankgrpo data import log.csv data/books --format interactions --catalog books.csv --item '{title} by {author}'
    """
    from rankgrpo.data.importers.convert import ImportOptions, import_dataset, parse_columns
    from rankgrpo.data.importers.download import fetch_if_url
    from rankgrpo.evaluation.health import headline
    from rankgrpo.items.format import ItemFormat

    check_least(0, seed=seed)
    if format == "interactions":
        file = fetch_if_url(source, sha256, out.absolute().parent)
        print(_import_log(file, out, catalog, parse_columns(columns), validation_frac, test_frac, seed, log))
        return
    if replace(log, item=LogArgs.item) != LogArgs():
        raise ConfigError("--num-history and the other options of a log belong to --format interactions")
    options = ImportOptions(
        item=ItemFormat(log.item),
        format=format,
        catalog=catalog,
        columns=parse_columns(columns),
        groundtruth=groundtruth,
        validation_frac=validation_frac,
        test_frac=test_frac,
        seed=seed,
    )
    done, dataset = import_dataset(fetch_if_url(source, sha256, out.absolute().parent), out, options)
    print(f"{done}\n\n{headline(dataset)}")


def _import_log(
    source: Path,
    out: Path,
    catalog: Path | None,
    columns: dict[str, str],
    validation_frac: float,
    test_frac: float,
    seed: int,
    log: LogArgs,
) -> str:
    from rankgrpo.data.importers.interactions import InteractionOptions, import_interactions
    from rankgrpo.items.format import ItemFormat

    options = InteractionOptions(
        catalog=catalog,
        columns=columns,
        validation_frac=validation_frac,
        test_frac=test_frac,
        seed=seed,
        **{**vars(log), "item": ItemFormat(log.item)},
    )
    return import_interactions(source, out, options)


@data_app.command
def demo(
    out: Positional[Annotated[Path, arg(help="folder to write")]],
    *,
    num_train: int = 4000,
    num_validation: int = 200,
    num_test: int = 500,
    seed: int = 0,
) -> None:
    """Write the built-in demo world as a data set folder.

    Try:
      rankgrpo data demo my-demo --num-train 10000
    """
    from rankgrpo.data.demo import write_demo

    check_least(1, num_train=num_train, num_validation=num_validation, num_test=num_test)
    check_least(0, seed=seed)
    write_demo(out, num_train=num_train, num_validation=num_validation, num_test=num_test, seed=seed)
    print(out)
