"""The benchmark: its queries stay apart, its control is the engine untouched, its files are whole.

Models are static ones of made-up topics, so that the teacher is known to be better; oracles are
float64 numpy from formulas.md 6.
"""

import json
import math
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from conch_dna.errors import ConchError
from conch_dna.sedimentation import benchmark_distillation
from conch_dna.sedimentation.benchmark.collections import Collection, read_beir, read_collection
from conch_dna.sedimentation.benchmark.report import markdown_table
from conch_dna.sedimentation.benchmark.rows import (
    CONTROL,
    SWEPT,
    TEACHER,
    WORDS,
)
from conch_dna.sedimentation.benchmark.stages import split_queries
from conch_dna.sedimentation.benchmark_distillation import (
    dcg_at_k,
    evaluate_engine,
    main,
    ndcg_at_k,
    run_training_cycle,
)
from conch_dna.sedimentation.config import ChelationConfig
from conch_dna.sedimentation.engine import AntigravityEngine
from topic_models import TOPICS, WORDS_EACH, documents, tables, write_static
from topic_models import WORDS as VOCABULARY

DOCUMENTS, QUERIES = 120, 60
# Of the sweep in the run that most tests look at; a whole one has ten.
WEIGHTS = (0.3, 1.0)
FUSION = "fusion of the best student row and BM25"


def topics_of(text: str) -> set[int]:
    return {int(word.split("word")[0].removeprefix("topic")) for word in text.split()}


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_beir(folder: Path) -> Path:
    """Queries of two topics; a document of both is worth 2, of one of them 1."""
    random = np.random.default_rng(5)
    corpus = documents(DOCUMENTS, seed=3)
    queries, lines = [], ["query-id\tcorpus-id\tscore"]
    for number in range(QUERIES):
        both = topics_of(corpus[number]["text"])
        words = [VOCABULARY[t * WORDS_EACH + w] for t in both for w in random.choice(12, 2, False)]
        queries.append({"_id": f"q{number}", "text": " ".join(words)})
        for each in corpus:
            if grade := len(both & topics_of(each["text"])):
                lines.append(f"q{number}\t{each['id']}\t{grade}")
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": e["id"], "title": e["title"], "text": e["text"]} for e in corpus]
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Made:
    student: str
    teacher: str
    task: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("benchmark")
    teacher, student = tables()
    return Made(
        student=str(write_static(folder / "student", student)),
        teacher=str(write_static(folder / "teacher", teacher)),
        task=write_beir(folder / "topics"),
    )


def run(made: Made, *more: str, task: str | None = None) -> Result:
    named = ["--task", task or str(made.task), "--model", made.student, "--teacher", made.teacher]
    return CliRunner().invoke(main, [*named, *more])


@pytest.fixture(scope="module")
def finished(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    output = tmp_path_factory.mktemp("results") / "results.json"
    config = output.with_name("store.yaml")
    config.write_text("gate-queries: 400\nthreshold: 7\n")
    settings = ["--cycles", "2", "--queries-per-cycle", "15", "--threshold", "1", "--sweep"]
    files = ["--config", str(config), "--output", str(output)]
    cache = ["--teacher-cache", str(output.with_name("vectors"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conch_dna.sedimentation.benchmark.rows.SWEPT", WEIGHTS)
        return run(made, *settings, *files, *cache), output


@pytest.fixture(scope="module")
def document(finished) -> dict:
    return json.loads(finished[1].read_text(encoding="utf-8"))


def rows_of(document: dict) -> dict[str, dict]:
    return {row["name"]: row for row in document["rows"]}


# A whole run


def test_the_command_writes_figures_plot_and_table(finished):
    result, output = finished
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text(encoding="utf-8"))["complete"] is True
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(output.with_suffix(".md")) in result.stdout.replace("\n", "")


def test_there_is_a_row_for_every_mode_and_cycle(document):
    names = [
        CONTROL,
        TEACHER,
        WORDS,
        *(
            f"{mode}, cycle {n}"
            for mode in ("baseline", "hybrid", "offline symmetric")
            for n in (1, 2)
        ),
        "asymmetric",
        "own table",
        "own table, asymmetric",
        *(f"offline symmetric, teacher_weight {weight:g}" for weight in WEIGHTS),
        FUSION,
    ]
    assert [row["name"] for row in document["rows"]] == names
    for row in document["rows"]:
        assert 0 <= row["ndcg_at_10"] <= 1 and 0 <= row["recall_at_100"] <= 1
        assert row["queries"] == 30
        assert all(seconds >= 0 for seconds in row["seconds"].values()) and row["seconds"]
        assert row["peak_memory_bytes"] > 2**20


def test_queries_of_cycles_are_never_evaluated(made, document):
    asked = [name for names in document["queries"]["cycles"] for name in names]
    evaluated = document["queries"]["evaluated"]
    assert [len(names) for names in document["queries"]["cycles"]] == [15, 15]
    assert not set(asked) & set(evaluated)
    assert sorted([*asked, *evaluated]) == sorted(read_beir(made.task).queries)


def test_the_control_row_is_the_engine_untouched(made, document):
    """Against the table's own rows in float64 and nDCG written out, not the engine's search."""
    collection = read_beir(made.task)
    table = dict(zip(VOCABULARY, np.asarray(tables()[1], np.float64), strict=True))

    def rows(texts: list[str]) -> np.ndarray:
        found = np.array([np.mean([table[word] for word in t.split()], axis=0) for t in texts])
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    names = document["queries"]["evaluated"]
    texts = [f"{each['title']} {each['text']}" for each in collection.documents]
    scores = rows([collection.queries[name] for name in names]) @ rows(texts).T
    found = []
    for name, row in zip(names, scores, strict=True):
        grades = collection.judgements[name]
        best = [collection.documents[n]["id"] for n in np.argsort(-row, kind="stable")[:10]]
        ideal = sorted(grades.values(), reverse=True)[:10]
        discounts = [1 / math.log2(rank + 2) for rank in range(10)]
        gained = sum(grades.get(each, 0) * d for each, d in zip(best, discounts, strict=True))
        found.append(gained / sum(g * d for g, d in zip(ideal, discounts, strict=False)))
    control = rows_of(document)[CONTROL]
    assert control["ndcg_at_10"] == pytest.approx(np.mean(found), abs=1e-6)
    assert control["against_control"]["ndcg_at_10"] == {"difference": 0.0, "interval": [0.0, 0.0]}
    assert "activated" not in control


def test_the_teacher_is_the_ceiling_of_the_student(document):
    rows = rows_of(document)
    ceiling = rows[TEACHER]["ndcg_at_10"]
    dense = [row for row in document["rows"] if row["name"] not in (TEACHER, WORDS, FUSION)]
    assert rows[CONTROL]["ndcg_at_10"] < ceiling
    assert all(row["ndcg_at_10"] <= ceiling for row in dense)
    assert rows["asymmetric"]["gap_closed"] == pytest.approx(
        (rows["asymmetric"]["ndcg_at_10"] - rows[CONTROL]["ndcg_at_10"])
        / (ceiling - rows[CONTROL]["ndcg_at_10"])
    )


def test_a_row_says_what_the_gate_said(document):
    rows = rows_of(document)
    for name, row in rows.items():
        if name in (CONTROL, TEACHER, WORDS, FUSION):
            continue
        assert isinstance(row["activated"], bool) and row["reason"]
        if not row["activated"] and row["version"] == "raw":
            assert row["ndcg_at_10"] == rows[CONTROL]["ndcg_at_10"]
    assert rows["offline symmetric, cycle 1"]["kind"] == "distillation"
    assert rows["offline symmetric, cycle 2"]["kind"] == "cycle"
    assert rows["asymmetric"]["space"] == "asymmetric"
    weights = [rows[f"offline symmetric, teacher_weight {w:g}"]["teacher_weight"] for w in WEIGHTS]
    assert weights == list(WEIGHTS)
    assert rows["offline symmetric, cycle 1"]["activated"] is True
    assert rows["offline symmetric, cycle 1"]["against_control"]["ndcg_at_10"]["interval"][0] > 0


def test_the_intervals_hold_their_differences(document):
    rows = rows_of(document)
    for row in rows.values():
        found = row["against_control"]["ndcg_at_10"]
        low, high = found["interval"]
        assert low - 1e-12 <= found["difference"] <= high + 1e-12
        assert found["difference"] == pytest.approx(row["ndcg_at_10"] - rows[CONTROL]["ndcg_at_10"])


def test_the_fused_row_is_the_best_of_the_student(document):
    rows = rows_of(document)
    dense = [name for name in rows if name not in (TEACHER, WORDS, FUSION)]
    best, words = rows[FUSION]["fused"]
    assert words == WORDS
    assert rows[best]["ndcg_at_10"] == max(rows[name]["ndcg_at_10"] for name in dense)


def test_settings_come_from_a_file_and_the_command_line_wins(document):
    engine = document["config"]["engine"]
    assert (engine["gate_queries"], engine["threshold"]) == (400, 1)


def test_the_document_says_what_computed_it(document, made):
    assert document["config"]["cycles"] == 2
    assert document["config"]["engine"]["threshold"] == 1
    assert document["config"]["teacher"] == [made.teacher]
    assert document["versions"]["conch_dna"] and document["platform"]
    assert document["models"]["student"]["dimension"] == 20
    assert document["corpus"]["documents"] == DOCUMENTS


def test_the_markdown_table_holds_every_row(document, finished):
    text = finished[1].with_suffix(".md").read_text(encoding="utf-8")
    assert text == markdown_table(document)
    for row in document["rows"]:
        assert f"| {row['name']} | {row['ndcg_at_10']:.4f} |" in text
    assert "Stopped" not in text
    assert "Stopped" in markdown_table({**document, "complete": False})


def test_measured_rows_outlive_a_run_that_ends_early(made, tmp_path, monkeypatch):
    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark_distillation.Benchmark, "_cycles", interrupted)
    output = tmp_path / "results.json"
    output.write_text("of an earlier run", "utf-8")
    result = run(made, "--cycles", "1", "--queries-per-cycle", "5", "--output", str(output))
    assert result.exit_code == 130
    assert f"stopped; {output} holds the rows measured so far" in result.stderr
    document = json.loads(output.read_text(encoding="utf-8"))
    assert [row["name"] for row in document["rows"]] == [CONTROL, TEACHER, WORDS]
    assert document["complete"] is False


# Its functions


def opened(made: Made, folder: Path, mode: str, **config) -> AntigravityEngine:
    teacher = None if mode == "baseline" else made.teacher
    engine = AntigravityEngine(
        folder / mode, made.student, mode, teacher, config=ChelationConfig(**config)
    )
    engine.ingest(read_beir(made.task).documents)
    return engine


def test_an_evaluation_logs_nothing_and_a_cycle_does(made, tmp_path):
    collection = read_beir(made.task)
    with opened(made, tmp_path, "baseline", collapse_percentile=99) as engine:
        before = evaluate_engine(engine, collection.queries, collection.judgements)
        assert len(engine.log) == 0
        result = run_training_cycle(engine, list(collection.queries.values())[:20], threshold=1)
        assert len(engine.log) > 0
        after = evaluate_engine(engine, collection.queries, collection.judgements)
    assert result.kind == "cycle" and result.mode == "baseline"
    assert before.queries == after.queries == list(collection.queries)
    assert result.activated or np.array_equal(before.ndcg, after.ndcg)


def test_evaluation_is_of_what_the_engine_answers(made, tmp_path):
    """Fusion included: with the ids of `run_inferences`, nDCG comes out the same."""
    collection = read_beir(made.task)
    for number, fusion in enumerate(("none", "rrf")):
        with opened(made, tmp_path / str(number), "baseline", fusion=fusion) as engine:
            found = evaluate_engine(engine, collection.queries, collection.judgements)
            asked = engine.run_inferences(list(collection.queries.values()), top_k=10)
        expected = [
            ndcg_at_k(answer.ids, collection.judgements[name])
            for name, answer in zip(collection.queries, asked, strict=True)
        ]
        assert found.ndcg == pytest.approx(expected, abs=1e-9)


def test_offline_distils_once_and_then_runs_cycles(made, tmp_path):
    collection = read_beir(made.task)
    queries = list(collection.queries.values())
    with opened(made, tmp_path, "offline") as engine:
        first = run_training_cycle(engine, queries[:10])
        second = run_training_cycle(engine, queries[10:20])
    assert [first.kind, second.kind] == ["distillation", "cycle"]
    assert first.documents > 0


def test_measures_by_hand_are_importable_here():
    assert dcg_at_k([1, 0, 1]) == 1.5
    assert ndcg_at_k(["b", "a"], {"a": 1}) == pytest.approx(1 / math.log2(3))


def test_teacher_vectors_are_kept_where_asked(finished):
    assert any(finished[1].with_name("vectors").rglob("*.safetensors"))


def test_a_sweep_has_ten_weights_up_to_one():
    assert [round(10 * weight) for weight in SWEPT] == list(range(1, 11))


# Queries


def collection_of(texts: dict[str, str], **more) -> Collection:
    return Collection(
        name="made",
        documents=[],
        queries=texts,
        judgements={name: {"d": 1} for name in texts},
        **more,
    )


def test_the_split_depends_on_the_seed_alone():
    collection = collection_of({f"q{n}": f"text {n}" for n in range(40)})
    found = [split_queries(collection, cycles=2, queries_per_cycle=8, seed=s) for s in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].cycles != found[2].cycles
    asked = [name for names in found[0].cycles for name in names]
    assert len(set(asked)) == 16 and len(found[0].evaluated) == 24
    assert not set(asked) & set(found[0].evaluated)


def test_a_query_with_an_asked_querys_text_is_not_evaluated():
    texts = {f"q{n}": f"Text  {n // 2}" if n % 2 else f"text {n // 2}" for n in range(40)}
    found = split_queries(collection_of(texts), cycles=1, queries_per_cycle=10, seed=0)
    asked = {text.lower().split()[1] for text in found.texts.values()}
    assert not asked & {text.lower().split()[1] for text in found.evaluated.values()}
    assert found.repeated == 40 - 10 - len(found.evaluated) > 0


def test_another_splits_queries_leave_all_judged_ones_to_evaluate():
    texts = {f"q{n}": f"text {n}" for n in range(4)}
    others = {f"t{n}": f"text {n}" for n in range(3, 9)}
    collection = collection_of(texts, others=others)
    found = split_queries(collection, cycles=1, queries_per_cycle=5, seed=0)
    assert found.evaluated == texts
    assert sorted(found.cycles[0]) == ["t4", "t5", "t6", "t7", "t8"]
    assert found.repeated == 1
    with pytest.raises(ConchError, match="at most 5 may be asked, those of the other split"):
        split_queries(collection, cycles=1, queries_per_cycle=6, seed=0)


@pytest.mark.parametrize(
    ("cycles", "each", "remedy"), [(3, 50, "--queries-per-cycle 5 or less"), (40, 1, "--cycles 17")]
)
def test_more_than_half_of_the_queries_are_refused(cycles, each, remedy):
    collection = collection_of({f"q{n}": f"text {n}" for n in range(35)})
    with pytest.raises(ConchError, match=f"at most 17 may be asked.*{remedy}"):
        split_queries(collection, cycles=cycles, queries_per_cycle=each, seed=0)


# Collections


def altered(made: Made, folder: Path, name: str, text: str) -> Path:
    """A copy of the collection in which one file is another."""
    (folder / "qrels").mkdir(parents=True)
    for each in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (folder / each).write_bytes((made.task / each).read_bytes())
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_folder_is_read_whole(made):
    found = read_beir(made.task)
    assert len(found.documents) == DOCUMENTS and len(found.queries) == QUERIES
    assert found.documents[7] == documents(DOCUMENTS, seed=3)[7]
    assert {grade for grades in found.judgements.values() for grade in grades.values()} == {1, 2}
    assert (found.name, found.empty, found.outside) == ("topics", 0, 0)
    assert len({topic for text in found.queries.values() for topic in topics_of(text)}) == TOPICS


def test_documents_without_text_are_left_out_and_counted(made, tmp_path):
    text = '{"_id": "d1", "title": "", "text": ""}\n{"_id": "d2", "text": "topic1word1"}\n'
    found = read_beir(altered(made, tmp_path / "c", "corpus.jsonl", text))
    assert [each["id"] for each in found.documents] == ["d2"]
    assert found.empty == 1
    assert found.outside == sum(map(len, found.judgements.values())) - sum(
        "d2" in grades for grades in found.judgements.values()
    )


def test_another_split_gives_queries_for_the_cycles(made, tmp_path):
    folder = altered(made, tmp_path / "c", "qrels/test.tsv", "q1\td1\t1\nq2\td1\t1\n")
    (folder / "qrels" / "train.tsv").write_text("q2\td1\t1\nq3\td1\t1\nq4\td1\t0\n", "utf-8")
    found = read_beir(folder, cycle_split="train")
    assert list(found.queries) == ["q1", "q2"]
    assert list(found.others) == ["q3"]
    with pytest.raises(ConchError, match=r"judges no query that test\.tsv does not"):
        read_beir(folder, cycle_split="test")


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_one_line(made, tmp_path, name):
    folder = altered(made, tmp_path / "c", name, "")
    (folder / name).unlink()
    result = run(made, "--output", str(tmp_path / "r.json"), task=str(folder))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: cannot read {folder / name}")
    assert "BEIR layout" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0\n", "no judged queries|judged q"),
        ("qrels/test.tsv", "", "names no query with a relevant document"),
        ("qrels/test.tsv", "q1\td1\tgood\n", r"line 1 of .*test\.tsv is"),
        ("qrels/test.tsv", "q1\tnowhere\t1\n", "judges none of the corpus's 120 documents"),
        ("qrels/test.tsv", "q999\td1\t1\n", "judges query 'q999', which has no text"),
        ("queries.jsonl", "{\n", r"line 1 of .*queries\.jsonl is not JSON"),
        ("corpus.jsonl", '{"text": "a"}\n', r"line 1 of .*corpus\.jsonl has no _id"),
        ("corpus.jsonl", '{"_id": "a"}\n{"_id": "a"}\n', "_id 'a' stands there twice"),
    ],
)
def test_a_broken_file_is_refused(made, tmp_path, name, text, message):
    with pytest.raises(ConchError, match=message):
        read_beir(altered(made, tmp_path / "c", name, text))


def test_a_missing_folder_is_not_looked_for_in_mteb(tmp_path):
    with pytest.raises(ConchError, match="is no folder: give a folder in BEIR layout"):
        read_collection(str(tmp_path / "nowhere"))


def test_without_mteb_a_name_asks_for_it_or_a_folder(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    result = run(made, task="SciFact")
    assert result.exit_code == 2
    assert "pip install mteb, or give a folder in BEIR layout" in result.stderr
    assert result.stderr.count("\n") == 1


class MadeTask:
    """What a task of mteb 2 has after `load_data`."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        corpus = [{"id": 1, "title": "a", "text": "b"}, {"id": 2, "text": ""}]
        part = {
            "corpus": corpus,
            "queries": [{"id": "q", "text": "what"}],
            "relevant_docs": {"q": {"1": 1, "9": 2}},
        }
        self.dataset = {"default": {"test": part, "dev": part}}

    def load_data(self) -> None:
        if self.failure:
            raise self.failure

    def convert_v1_dataset_format_to_v2(self, processes: int) -> None:
        pass


def made_mteb(monkeypatch: pytest.MonkeyPatch, task: MadeTask) -> None:
    """Mteb is not among what the tests need, so a module of the same form stands for it."""
    module = types.ModuleType("mteb")

    def get_task(name: str) -> MadeTask:
        if name != "Made":
            raise KeyError(f"'{name}' not found")
        return task

    module.get_task = get_task  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mteb", module)


def test_a_task_of_mteb_is_read(monkeypatch):
    made_mteb(monkeypatch, MadeTask())
    found = read_collection("Made")
    assert found.documents == [{"id": "1", "title": "a", "text": "b"}]
    assert found.queries == {"q": "what"} and found.judgements == {"q": {"1": 1, "9": 2}}
    assert (found.empty, found.outside) == (1, 1)
    with pytest.raises(ConchError, match=r"mteb has no task 'Other'.*Or give a folder"):
        read_collection("Other")
    with pytest.raises(ConchError, match="has 0 parts with a split 'train'"):
        read_collection("Made", split="train")
    with pytest.raises(ConchError, match="leave --cycle-split out"):
        read_collection("Made", cycle_split="train")


def test_mtebs_own_loader_gives_what_the_folder_gives(made, tmp_path, monkeypatch):
    """A real task whose data set lies in a folder, in the form that the hub has them in."""
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: its own loader did not run")
    folder, source = tmp_path / "hub", made.task
    qrels = [line.split("\t") for line in (source / "qrels" / "test.tsv").read_text().splitlines()]
    parts = {
        "corpus": [*map(json.loads, (source / "corpus.jsonl").read_text().splitlines())],
        "queries": [*map(json.loads, (source / "queries.jsonl").read_text().splitlines())],
        "default": [
            {"query-id": query, "corpus-id": document, "score": int(grade)}
            for query, document, grade in qrels[1:]
        ],
    }
    configs = []
    for name, rows in parts.items():
        for row in rows:
            row |= {"id": row.pop("_id")} if "_id" in row else {}
            row.pop("metadata", None)
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        configs.append(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl\n"
        )
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    task = type(mteb.get_task("SciFact"))
    place = {"dataset": {"path": str(folder), "revision": "main"}}
    monkeypatch.setattr(task, "metadata", task.metadata.model_copy(update=place))
    found, own = read_collection("SciFact"), read_collection(str(source))
    assert found.documents == own.documents and found.judgements == own.judgements
    assert {each: found.queries[each] for each in own.judgements} == {
        each: own.queries[each] for each in own.judgements
    }


def test_a_task_that_cannot_be_fetched_is_one_line(monkeypatch):
    made_mteb(monkeypatch, MadeTask(ConnectionError("no route\nto the hub")))
    with pytest.raises(ConchError, match=r"no route to the hub\. Without a network give a folder"):
        read_collection("Made")


# Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--cycles", "0"], "cycles is 0: it must be 1 or more"),
        (["--teacher-weight", "0"], "teacher_weight is 0: the teacher would teach nothing"),
        (["--teacher-share", "1", "--teacher-share", "2"], "2 shares do not fit 1 teachers"),
        (["--config", "no.yaml"], "cannot read --config no.yaml"),
        (["--epochs", "0"], "epochs is 0: it must be 1 or more"),
        (["--output", "results.txt"], "--output results.txt must end in .json"),
        (["--queries-per-cycle", "50"], "give --queries-per-cycle 10 or less"),
    ],
)
def test_bad_settings_are_one_line(made, given, message):
    result = run(made, *given)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_help_has_an_example():
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "python -m conch_dna.sedimentation.benchmark_distillation --task" in result.stdout
