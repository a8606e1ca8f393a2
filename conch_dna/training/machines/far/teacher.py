"""A teacher behind a URL: all that a local one tells without its weights.

Knows what servers say of their models; what they say of texts stands in models.py. Another kind of
server: a class beside `others.Scores`.
"""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conch_dna.checkpoints import content_digest, read_json, write_folder, write_json
from conch_dna.errors import ConchError, EgoUnavailableError, NotWholeError
from conch_dna.language_model import DIGEST_FILE, TOKENIZER_FILES, ModelSource
from conch_dna.loading.gguf_model import cache_folder
from conch_dna.screen.progress import Report
from conch_dna.training.data.outcomes import TargetIdentity
from conch_dna.training.machines.far.models import FarModel, OwnScores
from conch_dna.training.machines.far.others import Scores
from conch_dna.training.machines.far.wire import FORMAT
from conch_dna.training.settings import KDConfig
from conch_dna.web.client import ApiClient, Remedies, is_endpoint, parts_of, plain_fields

# The key that a teacher's server wants, on both machines.
KEY_VARIABLE = "CONCH_DNA_KEY"
TIMEOUT_S, RETRIES = 600.0, 2
QUICK_S = 20.0
# Of what a server says of its model: a tokenizer is some megabytes.
MOST_FILE_BYTES = 2**26
FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
REMEDIES = Remedies(
    slow="give a smaller --batch-size, or look at the server",
    absent="check the address, which often ends in /v1, and the model's name behind #",
    busy="try again later, a run that had begun with --resume",
    unreached="check the address, and that the server runs; a run that had begun goes on with "
    "--resume",
    unkeyed=f"take {KEY_VARIABLE} away and reach the server through an SSH tunnel",
)


def teacher_source(
    name: str, *, tokenizer: str = "", trust_remote_code: bool = False, **options: Any
) -> ModelSource:
    """A teacher by its name: a model's folder, hub id or embedded name, or a server's URL.

    Args:
        name: See `ModelSource` and `ServedTeacher`.
        tokenizer: Of a served model, where the server does not give it.
        trust_remote_code: See `ModelSource`.
        **options: See `ModelSource`.

    Raises:
        ConchError: There is no such model; or a tokenizer is given for one that has its own.
    """
    if is_endpoint(name):
        report = options.get("report")
        return ServedTeacher(
            name, tokenizer=tokenizer, trust_remote_code=trust_remote_code, report=report
        )
    if tokenizer:
        raise ConchError(
            f"--teacher-tokenizer goes with a teacher behind a URL, and {name} is none: leave it "
            "out"
        )
    return ModelSource(name, trust_remote_code=trust_remote_code, **options)


class ServedTeacher(ModelSource):
    """A teacher behind a URL.

    Args:
        url: Base address of an OpenAI-compatible server, `http://host:port/v1`; behind a # the
            model's name, where the server has several.
        tokenizer: Hub id or folder of its tokenizer, where the server does not give it and its
            model's name is no hub id.
        trust_remote_code: Let Python code that comes with the tokenizer run.
        report: Gets what is to be said of it.

    Raises:
        ConchError: The URL is none, or there is no such model or tokenizer; EgoUnavailableError
            where the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        tokenizer: str = "",
        trust_remote_code: bool = False,
        report: Report | None = None,
    ) -> None:
        address, _, self._asked = url.partition("#")
        self._name = self._asked
        parts = parts_of(address)
        if parts is not None and parts.path in ("", "/"):
            address = address.rstrip("/") + "/v1"
        if parts is None or not parts.hostname or parts.username or parts.password or parts.query:
            raise ConchError(
                "the teacher's URL has no host, a wrong port, a user, a password or a query: write "
                f"http://host:port/v1, and put a key into {KEY_VARIABLE}"
            )
        self.api = ApiClient(
            address,
            name=url,
            key_env=KEY_VARIABLE,
            timeout_s=TIMEOUT_S,
            retries=RETRIES,
            remedies=REMEDIES,
            # Nobody says when the last request was.
            keep_alive=False,
        )
        own = self._own_server(address, report)
        if own is None:
            folder = self._tokenizer_folder(tokenizer)
            kept = cache_folder() / "answers" / content_digest(address, self._name)[:32]
            self.scores: FarModel = Scores(self, kept)
        else:
            if tokenizer or self._asked not in ("", self._name):
                raise ConchError(
                    f"{self.api.name} serves {self._name} with its own tokenizer: leave out "
                    "--teacher-tokenizer, and another name behind #"
                )
            self.scores = OwnScores(self)
            folder = own
        super().__init__(folder, trust_remote_code=trust_remote_code, report=report)
        self.model_id = url
        try:
            assert self.tokenizer
        except ConchError as error:
            raise ConchError(f"the tokenizer of {url} cannot be used: {error}") from error

    def _own_server(self, address: str, report: Report | None) -> str | None:
        """The folder of what a server of ours says of its model; None for another server."""
        import openai

        known = cache_folder() / "teachers" / f"at_{content_digest(address)[:32]}.json"
        try:
            told = self._told_of_itself(openai)
        except EgoUnavailableError as error:
            if not isinstance(error.__cause__, openai.APIConnectionError):
                raise
            try:
                kept = read_json(known, needs={"folder": str, "name": str})
            except NotWholeError:
                raise error from None
            # What it has said already is enough for a run that asks for nothing else.
            if report is not None:
                report("message", {"message": f"{error}; going on with what it said before"})
            self._name = kept["name"]
            return str(kept["folder"])
        if told is None:
            return None
        folder = str(self._written(told))
        write_json(known, {"folder": folder, "name": self._name})
        return folder

    @property
    def _quick(self) -> Any:
        """The client for what takes no model's time."""
        return self.api.client.with_options(timeout=QUICK_S)

    def _told_of_itself(self, openai: Any) -> dict[str, Any] | None:
        """What a server of ours says of its model; None for another server."""
        with self.api.explained(QUICK_S):
            try:
                told = self._quick.get("/teacher", cast_to=object)
            except openai.NotFoundError:
                return None
            except openai.APIStatusError as error:
                if error.status_code in (400, 405):
                    return None
                raise
        if not isinstance(told, dict) or "weights_digest" not in told:
            return None
        if told.get("format") != FORMAT:
            raise ConchError(
                f"{self.api.name} speaks form {told.get('format')!r:.40} of `teach serve`, and "
                f"this is form {FORMAT}: use the same version of conch_dna on both machines"
            )
        return told

    def _written(self, told: dict[str, Any]) -> Path:
        """What a server says of its model as a folder in the cache, which holds no weights."""
        digest, files = told["weights_digest"], told.get("files")
        if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            raise ConchError(f"{self.api.name} gives no digest of its weights: it is not whole")
        contents: dict[str, bytes] = {}
        for name, text in files.items() if isinstance(files, dict) else ():
            if name not in FILES or not isinstance(text, str) or len(text) > 2 * MOST_FILE_BYTES:
                raise ConchError(
                    f"{self.api.name} sends {name!r:.80}, which is no file of a tokenizer"
                )
            try:
                contents[name] = base64.b64decode(text, validate=True)
            except ValueError as error:
                raise ConchError(f"{self.api.name} sends a broken {name}: {error}") from error
        if "config.json" not in contents or not contents.keys() & set(TOKENIZER_FILES):
            raise ConchError(
                f"{self.api.name} gives no config.json or no tokenizer: it is not whole"
            )
        self._name = str(told.get("model", ""))
        parts = [part for name in sorted(contents) for part in (name, contents[name])]
        folder = cache_folder() / "teachers" / content_digest(digest, *parts)[:32]
        if not (folder / DIGEST_FILE).is_file():

            def written(content: bytes) -> Callable[[Path], Any]:
                return lambda path: path.write_bytes(content)

            write_folder(
                folder,
                writers={name: written(content) for name, content in contents.items()},
                documents={DIGEST_FILE: {"model": self._name, "weights_digest": digest}},
            )
        return folder

    def _tokenizer_folder(self, tokenizer: str) -> str:
        """Where the tokenizer of another server's model lies; also finds out the model."""
        with self.api.explained(QUICK_S):
            entries = [plain_fields(each) for each in self._quick.models.list()]
        listed = [each for each in entries if isinstance(each.get("id"), str)]
        names = [each["id"] for each in listed]
        if not self._name and len(names) == 1:
            self._name = names[0]
        if self._name not in names:
            shown = ", ".join(names[:8]) or "no model"
            raise ConchError(
                f"{self.api.name} has {shown}: name one of them behind the address, as in "
                f"{self.api.name.partition('#')[0]}#{names[0] if names else 'NAME'}"
            )
        self._about = next(each for each in listed if each.get("id") == self._name)
        found = tokenizer or str(self._about.get("root") or self._name)
        try:
            return str(ModelSource(found, weights=False).folder)
        except ConchError as error:
            raise ConchError(
                f"the tokenizer of {self.api.name} was looked for as {found}: {error}; or give it "
                "by --teacher-tokenizer"
            ) from error

    @property
    def served_name(self) -> str:
        """What the server calls the model."""
        return self._name

    @property
    def is_far(self) -> bool:
        """Another process has it in memory."""
        return True

    @property
    def lasting_name(self) -> str:
        """What it is known by, wherever it is served."""
        return f"served: {self._name}"

    @property
    def is_weightless(self) -> bool:
        """It has weights, elsewhere."""
        return False

    @property
    def weights_digest(self) -> str:
        """Content address of its weights; of a server that does not tell it, of its name."""
        if isinstance(self.scores, OwnScores):
            needs = {"weights_digest": str}
            return str(read_json(self.folder / DIGEST_FILE, needs=needs)["weights_digest"])
        root = self._about.get("root")
        return content_digest("served", self._name, str(root or ""))

    @property
    def weight_bytes(self) -> int | None:
        """None: they are not here."""
        return None

    def require_outcomes(self, identity: TargetIdentity, config: KDConfig) -> None:
        """Refuse targets that this server cannot give.

        Raises:
            ConchError: It cannot.
        """
        self.scores.require(identity)
        own = isinstance(self.scores, Scores) and self.scores.scores_own_answers_only
        if own and (config.on_policy or config.own_answers):
            raise ConchError(
                f"{self.api.name} gives log-probabilities of its own answers only, and none of a "
                "student's: leave out --on-policy and --own-answers, or use `conch-dna teach "
                "serve` there"
            )

    def resident(self) -> Any:
        """What stands for the model in memory."""
        return self.scores

    def release(self) -> None:
        """Nothing of it is in memory."""
