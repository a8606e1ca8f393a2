"""Where training records come from: files, folders, data sets of the hub, standard input.

Knows names and splits; what a record is stands in records.py and forms.py.
To take another place: a branch in `_records`.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from conch_dna.errors import ConchError, number_of, told
from conch_dna.training.data.records import (
    STANDARD_INPUT,
    Record,
    checked,
    question_of,
    read_prompts,
    read_records,
)
from conch_dna.training.data.views import (
    OWN_ANSWER,
    context_of,
    demonstration_turns,
    with_context,
    with_own_answer,
)
from conch_dna.training.distillation import DEMONSTRATIONS, DOMAIN_PROMPTS, domain_examples
from conch_dna.training.settings import OF_DOMAIN

TRAIN, VALID, TEST = "train", "valid", "test"
# What `datasets` calls them, the first that is there.
SPLITS = {TRAIN: ("train",), VALID: ("validation", "valid", "val", "dev"), TEST: ("test",)}
OPTIONS = {TRAIN: "--data", VALID: "--valid-data", TEST: "--test-data"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_NOT_ON_THE_HUB = (".jsonl", ".json", ".txt", ".csv", ".parquet", ".yaml", ".gz", ".zip")
_TABLES = (".parquet", ".csv", ".arrow")
MOST_NAMED = 5

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a run was given to learn from and to be judged by, as it was named.

    Attributes:
        data: Records to train on, and those beside them to judge by: see `read_given`.
        prompts: Prompts for the teacher to answer instead.
        valid_data: Records to judge every step by, instead of a share of the others.
        test_data: Records to measure once, at the end.
        data_split: Of a data set of the hub, what to train on.
        demonstrations: Records that only the teacher reads, before every prompt.
        domain: Whose own prompts the teacher answers where nothing else is given.
        mapping: Of `forms.parse_mapping`.
        with_test: False leaves out a test set that lies beside the data.
    """

    data: str | None = None
    prompts: str | None = None
    valid_data: str | None = None
    test_data: str | None = None
    data_split: str | None = None
    demonstrations: str | None = None
    domain: str = ""
    mapping: Mapping[str, str] = field(default_factory=dict)
    with_test: bool | None = None


def read_given(given: Given, note: Note) -> dict[str, Any]:
    """Read all that was given.

    Args:
        given: The names.
        note: Gets what a user should know of what they were taken for, a sentence each.

    Returns:
        Arguments of `distill_domain`: `data` or `prompts`, `valid_data` and `test_data`, of which
        those that are not there are left out.

    Raises:
        ConchError: Something cannot be read, is named twice, or holds no records; or the whole
            test set is among the validation set.
    """
    named = [given.data, given.prompts, given.valid_data, given.test_data, given.demonstrations]
    if named.count("-") > 1:
        raise ConchError("standard input (-) can be read once: give the others as files")
    if given.prompts is not None and (given.mapping or given.data_split):
        raise ConchError("--map and --data-split are of --data: leave them out with --prompts")
    found: dict[str, list[Record]] = {}
    read: dict[str, Any] = {}
    if given.data is not None:
        found = _records(given.data, TRAIN, given, note)
        read["data"] = found.pop(TRAIN)
    elif given.prompts is not None:
        read["prompts"] = read_prompts(Path(given.prompts))
    elif given.mapping or given.data_split:
        raise ConchError("--map and --data-split are of --data: give it")
    if given.with_test is False and TEST in found:
        del found[TEST]
        note("test is false: the test set beside the data is not measured")
    for role, name in ((VALID, given.valid_data), (TEST, given.test_data)):
        if name is not None:
            found[role] = _records(name, role, given, note)[role]
    if given.with_test and TEST not in found:
        raise ConchError("test is true, but there is no test set: give --test-data, or test.jsonl")
    known = {_asked(record) for record in found.get(VALID, ())}
    if TEST in found and all(_asked(record) in known for record in found[TEST]):
        raise ConchError(
            "the test set is among the validation set, which chooses the step that is kept: give "
            "--test-data with other records, or leave it out"
        )
    read |= {f"{role}_data": records for role, records in found.items()}
    if contexts := sum(bool(context_of(each)) for rows in read.values() for each in rows):
        note(f"{number_of(contexts, 'record')} with a context, which only the teacher reads")
    shown = given.demonstrations
    if shown == OF_DOMAIN:
        shown = str(domain_demonstrations(given.domain))
    if shown not in (None, OWN_ANSWER) and not {"data", "prompts"} & read.keys():
        read["prompts"] = domain_examples(given.domain)
    return with_demonstrations(read, shown)


def domain_demonstrations(domain: str) -> Path:
    """The file of a domain's own demonstrations.

    Raises:
        ConchError: It is none of the six domains.
    """
    if domain not in DOMAIN_PROMPTS:
        raise ConchError(
            f"--demonstrations domain: {domain or 'no domain'} has none, only "
            f"{', '.join(DOMAIN_PROMPTS)}: give a file of records"
        )
    return DEMONSTRATIONS / f"{domain}.jsonl"


def with_demonstrations(
    read: Mapping[str, Sequence[Any]], demonstrations: str | None
) -> dict[str, Any]:
    """Prompts and records with what is shown to the teacher before them.

    Args:
        read: `data` or `prompts`, and what is judged by.
        demonstrations: A file of records, or `OWN_ANSWER` for each record's own; None for nothing.

    Raises:
        ConchError: The file cannot be read, or holds no demonstrations; or a record has a context
            that does not go with them.
    """
    if demonstrations is None:
        return dict(read)
    if demonstrations == OWN_ANSWER:
        if "data" not in read:
            raise ConchError(
                "--demonstrations answer shows the teacher a record's own answer: give --data"
            )
        return {name: _each(with_own_answer, rows) for name, rows in read.items()}
    if demonstrations == OF_DOMAIN:
        raise ConchError("--demonstrations domain is of distill: give a file of records, or answer")
    path = Path(demonstrations).expanduser()
    turns = demonstration_turns(read_records(path, option="--demonstrations"), str(path))
    return {name: _each(partial(with_context, turns=turns), rows) for name, rows in read.items()}


def _each(change: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
    """What becomes of each row; an error says which of them."""
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(change(row))
        except ConchError as error:
            raise ConchError(f"record {number}: {error}") from error
    return found


def leak_warnings(data: Sequence[Record], others: Mapping[str, Sequence[Record]]) -> list[str]:
    """What is learned, or chooses the step, although it should judge; a sentence for each pair.

    Args:
        data: Records to train on.
        others: Sets that judge, by their name; each must also be apart from those before it.
    """
    sets = {"training": data, **others}
    names = list(others)
    pairs = [("training", name) for name in names]
    pairs += [(one, name) for place, name in enumerate(names) for one in names[:place]]
    return [said for one, name in pairs if (said := _shared(one, sets[one], name, sets[name]))]


def _shared(one: str, learned: Sequence[Record], name: str, records: Sequence[Record]) -> str:
    """What two sets ask both, in a sentence; empty where it is nothing."""
    first: dict[str, int] = {}
    for number, record in enumerate(learned, 1):
        first.setdefault(_asked(record), number)
    pairs = [(n, first[q]) for n, r in enumerate(records, 1) if (q := _asked(r)) in first]
    if not pairs:
        return ""
    shown = ", ".join(f"{n} ({one} example {m})" for n, m in pairs[:MOST_NAMED])
    more = f" and {len(pairs) - MOST_NAMED} more" if len(pairs) > MOST_NAMED else ""
    return (
        f"{len(pairs)} of {number_of(len(records), f'{name} example')} ask what {one} examples "
        f"ask too, so that they flatter the student: {shown}{more}"
    )


def _asked(record: Record) -> str:
    # An answer to no question is a text.
    return question_of(record) or str(record.get("completion"))


def _records(name: str, role: str, given: Given, note: Note) -> dict[str, list[Record]]:
    """The records of a name by their roles; of one that is no training data only its own."""
    option, mapping = OPTIONS[role], given.mapping
    path = Path(name).expanduser()
    if path == STANDARD_INPUT:
        return {role: read_records(path, mapping=mapping, option=option)}
    if "://" in name:
        raise ConchError(
            f"{option} {name} is a URL: download it first, such as by curl -LO, and give the file"
        )
    if path.is_dir():
        return _folder(path, role, given, note)
    if path.exists():
        return {role: read_records(path, mapping=mapping, option=option)}
    if not HUB_NAME.fullmatch(name) or name.endswith(_NOT_ON_THE_HUB):
        raise ConchError(
            f"cannot read {option} {name}: no such file or folder (a data set of the hub is "
            "OWNER/NAME)"
        )
    note(f"{option} {name}: no such file or folder, so it is taken for a data set of the hub")
    return _hub(name, role, given)


def _folder(path: Path, role: str, given: Given, note: Note) -> dict[str, list[Record]]:
    option = OPTIONS[role]
    files = {each: path / f"{each}.jsonl" for each in SPLITS}
    if not files[role].is_file():
        inside = sorted(file.name for file in path.iterdir())
        if any(file.suffix in _TABLES for file in path.rglob("*")):
            note(f"{option} {path} has no {role}.jsonl but tables, which `datasets` reads")
            return _hub(str(path.resolve()), role, given)
        shown = f"it has {', '.join(inside[:8])}{' …' if inside[8:] else ''}" if inside else "empty"
        raise ConchError(f"{option} {path} has no {role}.jsonl ({shown})")
    if given.data_split and role == TRAIN:
        raise ConchError("--data-split is of data sets of the hub: name a file instead")
    wanted = files if role == TRAIN else {role: files[role]}
    return {
        each: read_records(file, mapping=given.mapping, option=option)
        for each, file in wanted.items()
        if file.is_file()
    }


def _hub(name: str, role: str, given: Given) -> dict[str, list[Record]]:
    """Records of a data set that `datasets` reads: of the hub, or in a folder of tables."""
    option = OPTIONS[role]
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import datasets
    except ImportError as error:
        raise ConchError(
            f"{option} {name} needs a package that is not here: pip install 'conch-dna[data]'"
        ) from error
    local = name.startswith("/")
    path, _, config = (name, "", "") if local else name.partition(":")
    split = given.data_split if role == TRAIN else None
    saved = local and any(Path(name).glob("dataset_*.json"))
    where = "" if local else ", which is no file or folder here either"
    # The hub, the network, and a dozen readers of tables each raise their own.
    with told(f"cannot read the data set {name}{where}"):
        if saved:
            loaded = datasets.load_from_disk(name)
            loaded = loaded if isinstance(loaded, dict) else {TRAIN: loaded}
            loaded = {TRAIN: loaded[split]} if split else loaded
        else:
            loaded = datasets.load_dataset(path, config or None, split=split)
            loaded = {TRAIN: loaded} if split else loaded
    wanted = tuple(SPLITS) if role == TRAIN and not split else (role,)
    chosen = {
        each: next((s for s in SPLITS[each] if s in loaded), None) if not split else TRAIN
        for each in wanted
    }
    if chosen[role] is None:
        raise ConchError(
            f"{option} {name} has no split {' or '.join(SPLITS[role])}, only {', '.join(loaded)}"
            + ("; choose one with --data-split" if role == TRAIN else "")
        )
    return {
        each: _rows(loaded[s], f"{name}, {split or s}", given.mapping)
        for each, s in chosen.items()
        if s is not None
    }


def _rows(rows: Any, where: str, mapping: Mapping[str, str]) -> list[Record]:
    named = ((f"{where}, row {number}", row) for number, row in enumerate(rows, 1))
    records = [checked(_as_json(row), name, mapping) for name, row in named]
    if not records:
        raise ConchError(f"{where} has no rows")
    return records


def _as_json(value: Any) -> Any:
    """A row as a line of JSON would have it.

    Without null, by which tables fill in what an object lacks, and what JSON cannot hold, such as
    pictures and dates.
    """
    if isinstance(value, dict):
        pairs = ((name, _as_json(each)) for name, each in value.items())
        return {name: each for name, each in pairs if each is not None}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    return value if isinstance(value, str | int | float | bool) else None
