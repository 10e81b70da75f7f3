"""Models by name (hf/TYPE, timm/NAME, a saved directory, file.py:factory), with the arguments of one call."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ecospa_fx
from ecospa_fx.checkpoint.directory import MANIFEST, saved_files
from ecospa_fx.demo.torchvision_cure import tolerate_missing_torchvision_ops
from ecospa_fx.errors import EcoSpaError
from ecospa_fx.see.explanation import example_call

from .console import FAILED, CommandError
from .small import call_of, small_config

SHORT = 8
"""Length of the prefix by which similar type names are found."""


@dataclass
class Named:
    """A model and the arguments of one call of it.

    Attributes:
        model: the model.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    @property
    def call(self) -> dict[str, Any]:
        """The call as keyword arguments of `explain`, `compile` and `verify`."""
        return {"example_inputs": self.args, "example_kwargs": self.kwargs or {}}


def named_model(
    name: str,
    *,
    full: bool = False,
    fields: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    factory: str | None = None,
    causal: bool = False,
) -> Named:
    """Make the model of a name.

    Args:
        name: name from the command line.
        full: use the default configuration, on the meta device, in place of a small one.
        fields: `FIELD=VALUE` for the configuration.
        inputs: shapes of the inputs, for a factory.
        factory: FILE.PY:NAME that makes the original of a saved model without a configuration.
        causal: accept a causal language model only.

    Raises:
        CommandError: there is no such model, or it cannot be made.
    """
    changes = fields_of(fields or ())
    kind, _, rest = name.partition("/")
    if kind == "hf" and rest:
        return _from_transformers(rest, full, changes, causal)
    if kind == "timm" and rest:
        return _from_timm(rest, full, changes)
    if re.search(r"\.py:\w+$", name):
        return _from_file(name, full, changes, inputs or ())
    if Path(name).is_dir():
        return _from_directory(Path(name), factory, inputs or (), causal)
    raise CommandError(
        f"there is no model `{name}`: name hf/TYPE (hf/llama), timm/NAME, a directory that is there, or file.py:factory"
    )


def fields_of(texts: Iterable[str]) -> dict[str, Any]:
    """Parse `FIELD=VALUE` texts: the values are numbers, booleans, lists, else text.

    Raises:
        CommandError: one has no `=`, or no field name before it.
    """
    fields = {}
    for text in texts:
        field, equals, value = text.partition("=")
        if not equals or not field.isidentifier():
            raise CommandError(f"`{text}` is not of the form FIELD=VALUE, such as hidden_size=64")
        try:
            fields[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[field] = value
    return fields


def device(full: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the device context in which a model is made: the meta device at full size."""
    return torch.device("meta") if full else contextlib.nullcontext()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the warnings of libraries about random weights, which are wanted here."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    before, hub_before = logging.get_verbosity(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
        hub.set_verbosity(hub_before)


def _from_transformers(name: str, full: bool, changes: Mapping[str, Any], causal: bool) -> Named:
    tolerate_missing_torchvision_ops()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with _quietly():
        if "/" in name:
            config = _hub_config(name)
        elif name in CONFIG_MAPPING:
            default = CONFIG_MAPPING[name]
            config = default(use_cache=False, **changes) if full else small_config(default, changes)
        else:
            types = list(CONFIG_MAPPING.keys())
            similar = difflib.get_close_matches(name, types, n=3)
            similar = similar or [each for each in types if each.startswith(name[:SHORT])][:3]
            hint = f"; similar names: {', '.join(similar)}" if similar else ""
            raise CommandError(f"transformers has no model type `{name}`{hint}")
        return _made(f"hf/{name}", config, full, causal)


def _hub_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"the configuration of `{name}` cannot be read from the hub: {_first_line(error)} Without a network, name "
            "hf/TYPE or a directory",
            FAILED,
        ) from None


def _made(name: str, config: Any, full: bool, causal: bool) -> Named:
    """Make a model of a configuration, with the first head that transformers has for it."""
    import transformers

    heads = ["AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"]
    heads += ["AutoModelForImageClassification", "AutoModel"]
    if causal or not getattr(config, "is_encoder_decoder", False):
        heads = heads[:1] if causal else heads
    else:
        heads = [heads[2], *heads]
    for head in heads:
        auto = getattr(transformers, head)
        if type(config) not in auto._model_mapping:
            continue
        try:
            with device(full):
                model: nn.Module = auto.from_config(config)
        except ImportError as error:
            raise CommandError(f"{name}: {_first_line(error)}", FAILED) from None
        except Exception as error:  # each architecture refuses sizes in its own way
            raise CommandError(
                f"{name}: {type(error).__name__} while the model is made: {_first_line(error)}", FAILED
            ) from error
        with device(full):
            return Named(model, (), call_of(model, config))
    wanted = "causal language model" if causal else f"model of {', '.join(heads)}"
    raise CommandError(f"{name}: transformers has no {wanted} of this type")


def _from_timm(name: str, full: bool, changes: Mapping[str, Any]) -> Named:
    tolerate_missing_torchvision_ops()
    import timm

    if not timm.is_model(name.split(".")[0]):
        similar = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; similar names: {', '.join(similar)}" if similar else ""
        raise CommandError(f"timm has no model `{name}`{hint}")
    try:
        with device(full):
            model = timm.create_model(name, pretrained=False, **changes)
    except TypeError as error:
        raise CommandError(f"timm/{name}: {_first_line(error)}") from None
    channels, *space = timm.data.resolve_model_data_config(model)["input_size"]
    size = changes.get("img_size", space)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    with device(full):
        return Named(model, (torch.randn(2, channels, height, width),))


def imported_name(name: str) -> Callable[..., Any]:
    """Return the function that FILE.PY:NAME names.

    Raises:
        CommandError: there is no such file, or no such function in it.
    """
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise CommandError(f"there is no file {path or name}")
    module = _imported(Path(path))
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise CommandError(f"{path} has no factory `{attribute}`; it has {', '.join(names[:5]) or 'none'}")
    function: Callable[..., Any] = factory
    return function


def gguf_model(path: Path) -> Named:
    """Load a language model from a GGUF file that transformers can read, de-quantised to float32.

    Raises:
        CommandError: it cannot.
    """
    if not path.is_file():
        raise CommandError(f"there is no file {path}")
    tolerate_missing_torchvision_ops()
    from transformers import AutoModelForCausalLM

    with _quietly():
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        except Exception as error:  # each format fails in its own way
            raise CommandError(f"{path} cannot be read: {_first_line(error)}", FAILED) from error
    # The weights are plain numbers now; as "quantised" ones they would not be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return Named(model.eval(), (), call_of(model, model.config))


def pretrained_model(path: Path) -> Any:
    """Load a model of transformers by the class that its configuration names, with weights.

    Raises:
        CommandError: there is none.
    """
    tolerate_missing_torchvision_ops()
    if not (path / "config.json").is_file():
        raise CommandError(f"{path} holds no model of transformers: there is no config.json")
    import transformers

    with _quietly(), contextlib.redirect_stderr(io.StringIO()):
        try:
            config = transformers.AutoConfig.from_pretrained(path)
            cls: Any = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
            return cls.from_pretrained(path, local_files_only=True).eval()
        except Exception as error:  # each class fails in its own way
            raise CommandError(f"{path} cannot be loaded: {_first_line(error)}", FAILED) from error


def tokenizer_of(name: str) -> Any:
    """Return the tokenizer in a directory of transformers, or in a GGUF file.

    Raises:
        CommandError: there is none.
    """
    from transformers import AutoTokenizer

    path = Path(name)
    try:
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # each tokenizer fails in its own way
        raise CommandError(f"{name} has no tokenizer: {_first_line(error)}; pass --batches FILE.PY:NAME") from error


def _from_file(name: str, full: bool, changes: Mapping[str, Any], shapes: Sequence[str]) -> Named:
    factory = imported_name(name)
    try:
        with device(full):
            result = factory(**changes)
    except Exception as error:
        raise CommandError(f"{name} failed with {type(error).__name__}: {_first_line(error)}", FAILED) from error
    args: tuple[Any, ...] = ()
    if isinstance(result, tuple) and len(result) == 2:
        result, inputs = result
        args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not isinstance(result, nn.Module):
        raise CommandError(f"{name} returns a {type(result).__name__}, not a module or (module, inputs)")
    with device(full):
        return _with_inputs(name, result, args, shapes)


def _with_inputs(name: str, model: nn.Module, args: tuple[Any, ...], shapes: Sequence[str]) -> Named:
    if shapes:
        return Named(model, tuple(map(_input, shapes)))
    if args:
        return Named(model, args)
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "main_input_name"):
        return Named(model, (), call_of(model, config))
    try:
        offered, kwargs = example_call(model, None, None)
    except EcoSpaError:
        raise CommandError(
            f"the inputs of {name} are unknown: pass --input 2x16:long for each, let the factory return (model, "
            "inputs), or give the model an example_input_array"
        ) from None
    return Named(model, offered, kwargs)


def _input(text: str) -> Tensor:
    shape, _, dtype = text.partition(":")
    kind = getattr(torch, dtype or "float32", None)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or not isinstance(kind, torch.dtype):
        raise CommandError(f"--input {text}: write a shape and, after a colon, a dtype: 2x16:long, 1x3x32x32")
    sizes = [int(size) for size in shape.split("x")]
    return torch.randn(sizes).to(kind) if kind.is_floating_point else torch.zeros(sizes, dtype=kind)


def _imported(path: Path) -> Any:
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"{path} fails with {type(error).__name__}: {_first_line(error)}", FAILED) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _from_directory(path: Path, factory: str | None, shapes: Sequence[str], causal: bool) -> Named:
    tolerate_missing_torchvision_ops()
    if (path / MANIFEST).is_file():
        return _saved(path, factory, shapes)
    if not (path / "config.json").is_file():
        raise CommandError(f"{path} holds no model: neither {MANIFEST} (ecospa_fx.save) nor config.json (transformers)")
    from transformers import AutoConfig

    with _quietly():
        try:
            config = AutoConfig.from_pretrained(path)
            config.use_cache = False
        except (OSError, ValueError) as error:
            raise CommandError(f"{path}/config.json cannot be read: {_first_line(error)}", FAILED) from None
        named = _made(str(path), config, False, causal)
        if any(path.glob("*.safetensors")):
            with contextlib.redirect_stderr(io.StringIO()):
                named.model = type(named.model).from_pretrained(path, local_files_only=True)  # type: ignore[attr-defined]
        return named


def _saved(path: Path, factory: str | None, shapes: Sequence[str]) -> Named:
    """Load a model that `ecospa_fx.save` wrote, from a factory, its configuration, or the name that made it."""
    if factory is None and (saved_files(path) / "config.json").is_file():
        with _quietly():
            return _with_inputs(str(path), ecospa_fx.load(path), (), shapes)
    source: dict[str, Any] | None = {"name": factory} if factory is not None else _source_of(path)
    if source is None:
        return _with_inputs(str(path), ecospa_fx.load(path), (), shapes)
    original = named_model(**source, inputs=shapes)
    model = ecospa_fx.load(path, lambda: original.model)
    return _with_inputs(str(path), model, (), shapes) if shapes else Named(model, original.args, original.kwargs)


SOURCE = "model.json"
"""File beside a saved model with the name that made it, for models without a configuration."""


def _source_of(path: Path) -> dict[str, Any] | None:
    if not (path / SOURCE).is_file():
        return None
    try:
        source = json.loads((path / SOURCE).read_text())
        arguments = {"name": str(source["name"]), "fields": [str(field) for field in source["fields"]]}
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"{path / SOURCE} cannot be read", FAILED) from None
    if ".py:" in arguments["name"]:  # a saved directory must not say which code to run
        raise CommandError(f"{path} was made by a factory; pass --factory FILE.PY:NAME")
    return arguments


def remember_source(path: Path, name: str, fields: Sequence[str] | None) -> None:
    """Write the name that made a model beside its save."""
    (path / SOURCE).write_text(json.dumps({"name": name, "fields": list(fields or ())}) + "\n")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]:.200}"


def write_pretrained(model: nn.Module, out: Path) -> None:
    """Write a model for plain transformers into `pretrained`, a folder of its own.

    Raises:
        CommandError: plain transformers would not load it.
    """
    why = ecospa_fx.save_pretrained(model, out / "pretrained")
    if why is not None:
        raise CommandError(
            f"plain transformers does not load {out / 'pretrained'}: {why}. With --deployable transformers "
            "only what it loads is removed",
            FAILED,
        )
