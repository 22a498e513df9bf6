"""The job file: everything a federation is told, in one place. TOML in, a frozen `Job` out, or one sentence."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from semver import Version

from fedkeel.core.errors import InputError, nearest
from fedkeel.core.registry import Rule, parse

Positive = Annotated[int, Field(ge=1)]
DEFAULT_CHECKS = ("layout", "version", "claims", "duplicate", "replayed", "finite")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Which examples there are, and who holds them."""

    source: str = Field("digits", description="where the examples come from: `fedkeel rules source`")
    partition: str = Field(
        "dirichlet(alpha=0.3)", description="how they lie with the clients: `fedkeel rules partition`"
    )
    clients: Positive = Field(50, description="how many clients there are")
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of each client's examples kept back to test that client's own model"
    )
    pooled: bool = Field(
        False, description="put the clients' examples together and train on them centrally: a baseline"
    )


class Model(Section):
    """What is trained."""

    build: str = Field("mlp", description="`fedkeel rules model`")
    loss: str = Field("cross_entropy", description="`fedkeel rules loss`")
    private: tuple[str, ...] = Field(
        (), description="name patterns of layers that stay on the client, as 'head.*'; '*': each client trains alone"
    )
    version: str = Field("1.0.0", description="semantic version of the model card")
    start: str | None = Field(
        None,
        description="a finished run, or a model directory, whose model is trained further; read where the run begins",
    )


class Train(Section):
    """What each selected client does."""

    batch_size: Positive = Field(20, description="examples per step")
    lr: Annotated[float, Field(gt=0, le=1e30)] = Field(0.1, description="learning rate of the local optimiser")
    lr_schedule: str = Field("constant", description="factor of lr over the rounds: `fedkeel rules rate`")
    optimiser: str = Field("sgd", description="of the client's steps: `fedkeel rules optimiser`")
    stopping: str = Field("epochs(epochs=1)", description="how long a client trains: `fedkeel rules stopping`")
    validation: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of each client's examples that it does not train on, to tell its loss by"
    )
    private_first: str | None = Field(
        None, description="how long model.private is trained alone, before the shared layers alone: as stopping"
    )
    corrections: tuple[str, ...] = Field((), description="changes to the local gradient: `fedkeel rules correction`")
    objective: str = Field("plain", description="what the steps descend: `fedkeel rules objective`")
    backend: str = Field("auto", description="auto, native, traced, rows or loop: the same results, at different speed")
    device: str = Field("cpu", description="cpu or cuda")
    workers: Positive | None = Field(None, description="worker processes; one a core when left out")


class Select(Section):
    """Who takes part in a round."""

    cohort: Positive | None = Field(None, description="clients per round; all when left out")
    rule: str = Field("uniform", description="`fedkeel rules selector`")
    longest_wait: Positive | None = Field(
        None, description="rounds that no client waits longer than before it is chosen again; no bound when left out"
    )


class Schedule(Section):
    """When a round closes."""

    rule: str = Field("sync", description="`fedkeel rules scheduler`")
    interval: str = Field(
        "fixed", description="how a client's steps change from update to update: `fedkeel rules interval`"
    )
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="end of the run by the federation's clock, if its rounds are not done before"
    )


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DeviceClass(Section):
    """One class of devices."""

    share: Rate = Field(1.0, description="its part of the clients, relative to the other classes'")
    clients: str | None = Field(None, description="or the clients that have such a device, by name pattern")
    time: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        1.0, description="how long local work takes, relative to a device of time 1"
    )
    up: Rate | None = Field(None, description="bytes a second to the server; messages take no time when left out")
    down: Rate | None = Field(None, description="bytes a second from the server")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="probability that a task is never finished")
    available: str = Field("always", description="when the device can work: `fedkeel rules availability`")


class Devices(Section):
    """What the clients run on, in simulation."""

    profile: Literal["equal", "reference"] = Field(
        "equal", description="built-in classes: equal, or reference (A, B, C of time 1.0, 2.3, 5.7 in equal parts)"
    )
    classes: Mapping[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], DeviceClass] = Field(
        {}, description="your own classes instead: {phone = {share = 3, time = 4.0, up = 250000}}"
    )
    file: str | None = Field(
        None, description="CSV file of single devices: client, and any of class, time, up, down, dropout"
    )
    round_seconds: Seconds = Field(1.0, description="seconds of a round's local work on a device of time 1")
    step_seconds: Seconds = Field(0.0, description="and of each of its steps")
    jitter: Annotated[float, Field(ge=0, le=3)] = Field(
        0.0, description="standard deviation of the logarithm of a task's time about its class's"
    )
    latency: Seconds = Field(0.0, description="seconds that every message takes, whatever its size")
    notice: Seconds = Field(0.0, description="seconds until the server learns that a client has dropped out")


Level = Annotated[int, Field(ge=0, le=22)]


class Client(Section):
    """What a client does to its update before it leaves."""

    transforms: tuple[str, ...] = Field((), description="in order: `fedkeel rules row_transform`")
    codec: str = Field("float32", description="`fedkeel rules codec`")
    zstd: Level = Field(0, description="compression level of the payload, 0 for none")
    error_feedback: bool = Field(False, description="add what the codec loses of an update to the client's next one")
    labels: bool = Field(False, description="tell the server the shares of the classes, as the weigher trust uses them")
    label_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0,
        description="scale of the Laplace noise on the counts behind those shares, not drawn from the seed; under "
        "local noise on the shares themselves",
    )


class Aggregate(Section):
    """How updates become one: check, screen, weigh, mix, reduce."""

    checks: tuple[str, ...] = Field(DEFAULT_CHECKS, description="at the door, in order: `fedkeel rules check`")
    screens: tuple[str, ...] = Field((), description="against the cohort: `fedkeel rules screen`")
    weigh: tuple[str, ...] = Field(("examples",), description="weights, multiplied: `fedkeel rules weigher`")
    mix: tuple[str, ...] = Field((), description="in order: `fedkeel rules mixer`")
    reduce: str = Field(
        "mean",
        description="rows to one: `fedkeel rules reducer`; or auto, which chooses screens, weigh and mix as well",
    )
    hostile: Annotated[int, Field(ge=0)] | None = Field(
        None, description="how many of the clients auto allows for being hostile; a fifth of them when left out"
    )


class Quarantine(Section):
    """Clients that are refused again and again are left out for a while."""

    limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="record of refusals that shuts a client out, each counting 1; none when left out"
    )
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="what a round leaves of a record; below half of the limit a client is let in again"
    )


class Privacy(Section):
    """What noise hides, and how much of it a run may spend."""

    mechanism: str | None = Field(None, description="`fedkeel rules mechanism`; nothing is hidden when left out")
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="budget: the noise is solved for it where the mechanism says none, and the run ends within it"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(
        1e-5, description="probability that epsilon does not bound; well below one over the number of those hidden"
    )
    uses: Positive | None = Field(
        None, description="rounds that a client takes part in at most, where each client's rounds are what is counted"
    )
    least_examples: Positive | None = Field(
        None,
        description="examples that a client has at least, where steps are noised; who has fewer does not take part. In "
        "simulation what the clients have when left out",
    )
    metrics_noise: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="Gaussian noise on the losses that clients tell under local and examples, relative to how far they "
        "can move; they tell none when it is left out",
    )
    metrics_bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="what such a loss is cut to; 5 when left out"
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld", description="how Poisson sampling is counted: privacy loss distributions, or Renyi divergences"
    )
    insecure_reproducible_noise: bool = Field(
        False, description="draw noise and samples from the run's seed: for tests alone, as it hides nothing"
    )


class Secagg(Section):
    """Sums under masks: the server is given sums of clients' updates, and no update."""

    size: Annotated[int, Field(ge=3, le=1000)] | None = Field(
        None, description="clients that add up together, at least; every update goes to the server when left out"
    )
    norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="L2 norm that updates are scaled down to; 100, or privacy.mechanism's, when left out"
    )
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        60.0, description="that each step of a sum waits for its last client, in a deployment"
    )


class Server(Section):
    """How the model moves along the aggregate."""

    optimiser: str = Field("sgd", description="`fedkeel rules server_optimiser`")
    codec: str = Field(
        "float32",
        description="of the model's way to the clients; other than float32: coded steps from the model that they have",
    )
    zstd: Level = Field(0, description="compression level of those steps, 0 for none")
    examples: Annotated[int, Field(ge=0)] = Field(
        0, description="examples that the server holds itself, taken from the clients' in proportion to the labels"
    )


class Attack(Section):
    """Hostile clients, in simulation only."""

    rule: str | None = Field(
        None,
        description="what they do: `fedkeel rules attack`, joined by ' + '; nobody is hostile when left out",
    )
    clients: Annotated[int, Field(ge=0)] = Field(0, description="how many of the clients are hostile")


class Record(Section):
    """What is written down, and how often."""

    evaluate_every: Positive = Field(1, description="rounds between evaluations; the last round always is")
    checkpoint_every: Positive = Field(10, description="rounds between checkpoints")
    contribution: str | None = Field(
        None, description="what each client was worth, in every round: `fedkeel rules contribution`"
    )
    fine_tune: str | None = Field(
        None,
        description="steps that a client takes from the shared model on its own data before its own is tested: "
        "`fedkeel rules stopping`; none when left out",
    )
    groups: Mapping[Annotated[str, Field(min_length=1)], str] = Field(
        {}, description="groups of clients to measure together, by name pattern: {phones = 'phone-*'}"
    )


class Job(Section):
    """A federation as its user writes it. Every rule is text, written as a call: `trimmed_mean(trim=2)`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "federation"
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Positive = 20
    plugins: tuple[str, ...] = Field((), description="Python files with your own rules, models, sources")
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    select: Select = Select()
    schedule: Schedule = Schedule()
    devices: Devices = Devices()
    client: Client = Client()
    aggregate: Aggregate = Aggregate()
    quarantine: Quarantine = Quarantine()
    privacy: Privacy = Privacy()
    secagg: Secagg = Secagg()
    server: Server = Server()
    attack: Attack = Attack()
    record: Record = Record()

    def __init__(self, **values: Any) -> None:
        if values.get("aggregate") == "auto":
            values["aggregate"] = {"reduce": "auto"}
        try:
            super().__init__(**_tuples(values))
        except ValidationError as error:
            raise InputError(_sentence(error)) from None
        if not Version.is_valid(self.model.version):
            raise InputError(f"model.version = '{self.model.version}' is no semantic version: write it as '1.0.0'")
        if self.attack.clients > self.data.clients:
            raise InputError(
                f"attack.clients = {self.attack.clients} is more than data.clients = {self.data.clients}: lower it"
            )
        if self.attack.clients and self.attack.rule is None:
            raise InputError(f"attack.clients = {self.attack.clients}, but attack.rule is missing: name an attack")
        if self.aggregate.hostile is not None and self.aggregate.reduce != "auto":
            raise InputError(
                f"aggregate.hostile = {self.aggregate.hostile} is for aggregate.reduce = 'auto' alone: leave out one"
            )
        if self.devices.classes and self.devices.profile != "equal":
            raise InputError(
                f"devices.profile = '{self.devices.profile}' and devices.classes both say what devices there are: "
                "leave out one"
            )
        if self.server.zstd and self.server.codec == "float32":
            raise InputError(
                f"server.zstd = {self.server.zstd} packs the steps of server.codec, and there are none: name a codec"
            )
        if self.privacy.mechanism is None and self.privacy != Privacy():
            raise InputError("privacy says how much is hidden, but not by what: name privacy.mechanism, as 'central'")
        if self.secagg.size is None and self.secagg != Secagg():
            raise InputError("secagg says how updates are added up, but not in groups of how many: set secagg.size")
        if self.privacy.metrics_bound is not None and self.privacy.metrics_noise is None:
            raise InputError(
                f"privacy.metrics_bound = {self.privacy.metrics_bound:g} is for losses with noise: set "
                "privacy.metrics_noise, as 5.0"
            )
        if self.data.pooled and self.secagg.size is not None:
            raise InputError("data.pooled leaves no clients to add up: leave out secagg.size")
        if self.data.pooled and self.privacy.mechanism is not None:
            raise InputError("data.pooled leaves no clients to hide: leave out privacy.mechanism")
        if self.data.pooled and self.devices != Devices():
            raise InputError("data.pooled trains in one place: leave out devices")
        if self.data.pooled and self.attack.clients:
            raise InputError("data.pooled leaves no clients to be hostile: leave out attack.clients")
        if (self.select.cohort or 1) > self.data.clients:
            raise InputError(
                f"select.cohort = {self.select.cohort} is more than data.clients = {self.data.clients}: lower it"
            )

    @property
    def cohort(self) -> int:
        """How many clients take part in a round."""
        return 1 if self.data.pooled else self.select.cohort or self.data.clients

    @property
    def attacks(self) -> tuple[Rule, ...]:
        """The built attacks that `attack.rule` names, in order; none where nobody is hostile."""
        texts = [] if self.attack.rule is None else split_list(self.attack.rule, "+", empty=True)
        return tuple(self._parsed("attack.rule", "attack", text) for text in texts)

    def rule(self, key: str, kind: str) -> Rule:
        """The built rule that a key such as `aggregate.reduce` names."""
        return self._parsed(key, kind, self._value(key))

    def rules(self, key: str, kind: str) -> tuple[Rule, ...]:
        """The built rules of a key that lists several, as `aggregate.checks`."""
        return tuple(self._parsed(key, kind, text) for text in self._value(key))

    def _value(self, key: str) -> Any:
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)

    def _parsed(self, key: str, kind: str, text: str) -> Rule:
        try:
            return parse(kind, text)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None

    def to_toml(self) -> str:
        """The job as a file that `load` reads back to the same job."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    def with_settings(self, settings: Iterable[str]) -> Job:
        """A job with `section.key=value` settings applied, as `--set` gives them."""
        values = self.model_dump(mode="json", exclude_none=True)
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or "\n" in setting:
                raise InputError(f"'{setting}' is no setting: write section.key=value")
            if key.strip() == "aggregate" and text.strip() == "auto":
                key = "aggregate.reduce"
            _assign(values, key.strip(), text.strip())
        return Job(**values)


def load(path: Path | str) -> Job:
    """The job in a TOML file. Plugin paths are taken relative to the file."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"job file '{path}' does not exist: `fedkeel new NAME` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"job file '{path}' can not be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"job file '{path}' is not valid TOML: {error}") from None
    plugins = values.get("plugins", [])
    if isinstance(plugins, list):
        values["plugins"] = [str(path.parent / p) if isinstance(p, str) else p for p in plugins]
    return Job(**values)


def field_type(key: str) -> Any:
    """The annotation of a job key such as `train.lr`, or an `InputError` naming the nearest key."""
    model: type[BaseModel] = Job
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if part not in model.model_fields:
            where = ".".join(parts[:depth])
            prefix = f"{where}." if where else ""
            raise InputError(
                f"key '{key}' is unknown: {nearest(prefix + part, [prefix + f for f in model.model_fields])}"
            )
        annotation = model.model_fields[part].annotation
        nested = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        if nested != (depth < len(parts) - 1):
            raise InputError(f"key '{key}' names no value: write section.key, as train.lr")
        if nested:
            model = annotation  # type: ignore[assignment]
    return annotation


def split_list(text: str, separator: str = ",", *, empty: bool = False) -> list[str]:
    """Split at commas, or another separator, outside brackets and quotes: `mean,trimmed_mean(trim=2)`.

    Parts that are empty are left out, or kept where something is missing then.
    """
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip() or empty]


def _assign(values: dict[str, Any], key: str, text: str) -> None:
    annotation = field_type(key)
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = _read(annotation, text)


def _read(annotation: Any, text: str) -> Any:
    """A value as TOML would read it; text stays text where the key takes text; a list may be written `a,b`."""
    kinds = {annotation, *get_args(annotation)}
    if any(getattr(k, "__origin__", None) is tuple or k is tuple for k in kinds):
        inner = text.strip().removeprefix("[").removesuffix("]")
        return [part.strip("'\"") for part in split_list(inner)]
    if text in ("", "none") and type(None) in kinds:
        return None
    if str in kinds and get_origin(annotation) is not Mapping:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _tuples(values: Any) -> Any:
    """Lists as tuples: what frozen sections hold."""
    if isinstance(values, Mapping):
        return {k: _tuples(v) for k, v in values.items()}
    return tuple(_tuples(v) for v in values) if isinstance(values, list) else values


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown(key)
    value = first["input"]
    shown = f"= {value!r} is" if not isinstance(value, Mapping) else "is"
    return f"{key} {shown} not valid: {first['msg'][0].lower()}{first['msg'][1:]}"


def _unknown(key: str) -> str:
    try:
        field_type(key)
    except InputError as error:
        return str(error)
    return f"key '{key}' is unknown"
