"""The configuration, ``adapter_config.json``: written for PEFT and vLLM, and read strictly."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
VERSION = "0.21.2"  # of PEFT, whose format this is

# Initializers: those that leave the base as it is, and those that PEFT repeats on the base.
_PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica")
REDONE = ("pissa", "olora")

# The keys that change what an adapter computes, and their types.
_KNOWN: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "use_rslora": bool,
    "use_dora": bool,
    "lora_bias": bool,
    "fan_in_fan_out": bool,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "bias": str,
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "target_parameters": list,
    "modules_to_save": list,
    "layers_to_transform": (int, list),
    "layers_pattern": (str, list),
    "trainable_token_indices": (dict, list),
    "ensure_weight_tying": bool,
    "init_lora_weights": (bool, str),
    "peft_type": str,
    "peft_version": str,
}

# The keys that change nothing of what a trained adapter computes.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode lora_dropout "
    "megatron_core megatron_config eva_config corda_config loftq_config lora_ga_config "
    "qalora_group_size runtime_config velora_config".split()
)

# The keys by which an adapter is no plain LoRA.
_VARIANTS = frozenset(
    "alora_invocation_tokens arrow_config enable_lora kasa_config layer_replication "
    "monteclora_config use_bdlora use_qalora".split()
)

TASKS = "CAUSAL_LM SEQ_2_SEQ_LM SEQ_CLS TOKEN_CLS QUESTION_ANS FEATURE_EXTRACTION".split()

# The names of the classes that have an output head for tokens.
HEADED = re.compile(
    r".*(LMHead|For(Causal|Masked)LM|ForPreTraining|ForConditionalGeneration|MTModel|WithLM"
    r"|DoubleHeads|ForGeneration|EncoderDecoder).*"
)

_LARGEST = 2**31  # of ranks and alphas: beyond that, the file is damaged
_VLLM_SAVES = {"classifier", "score"}
_VLLM_RANK = 512


def write(
    modules: Mapping[str, tuple[int, np.float32]],
    parameters: Iterable[str],
    known: Sequence[str],
    *,
    all_named: bool,
    rslora: bool,
    **more: Any,
) -> dict[str, Any]:
    """Write the configuration of an adapter.

    Args:
        modules: rank and scale by the full name of a module, or of a parameter.
        parameters: which of them are parameters.
        known: the names of all modules of the model that have a weight.
        all_named: whether there are no others.
        rslora: whether PEFT divides alpha by the root of the rank.
        more: other keys.
    """
    alphas = {name: _alpha(rank, scale, rslora) for name, (rank, scale) in modules.items()}
    ranks = {name: rank for name, (rank, _) in modules.items()}
    usual = (Counter(x.values()).most_common(1) for x in (ranks, alphas))
    rank, alpha = (found[0][0] if found else 1 for found in usual)
    parameters = sorted(parameters)
    targets = [name for name in modules if name not in parameters]
    return {
        "alpha_pattern": _pattern(alphas, alpha),
        "auto_mapping": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "peft_version": VERSION,
        "r": rank,
        "rank_pattern": _pattern(ranks, rank),
        "revision": None,
        "target_modules": _targets(targets, known, all_named),
        "target_parameters": parameters or None,
        "use_rslora": rslora,
        **more,
    }


def one_scale(rank: int) -> dict[str, Any]:
    """Write the keys of an adapter whose modules all have this rank, and scale 1."""
    patterns = {"rank_pattern": {}, "alpha_pattern": {}}
    return {"r": rank, "lora_alpha": rank, "use_rslora": False, **patterns}


def _alpha(rank: int, scale: np.float32, rslora: bool) -> float | int:
    """Find the roundest alpha that gives the very scale."""
    divisor = math.sqrt(rank) if rslora else rank
    alpha = float(scale) * divisor
    if not math.isfinite(alpha):
        raise ValueError(f"peft.save: a scale is {scale}, expected a finite number")
    for digits in (0, 3, 6):
        rounded = round(alpha, digits)
        if np.float32(rounded / divisor) == scale:
            return int(rounded) if rounded == int(rounded) else rounded
    return alpha


def _pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """Keep the values that differ, by patterns that match no other name in any order."""
    keys = {}
    for name, value in values.items():
        if value != usual:
            alike = [other for other in values if _match(name, other)]
            is_own = name in alike and all(values[other] == value for other in alike)
            keys[name if is_own else f"^{re.escape(name)}"] = value
    return keys


def _targets(targets: Sequence[str], known: Sequence[str], all_named: bool) -> list[str] | str:
    """Name these modules and no others: by last names if these will do."""
    wanted, listed = set(targets), set()
    for name in targets:
        last = name.rpartition(".")[2]
        alike = {other for other in known if matches([last], other)}
        listed.add(last if all_named and alike <= wanted else name)
    if {name for name in known if matches(sorted(listed), name)} <= wanted:
        return sorted(listed)
    return "|".join(map(re.escape, sorted(wanted)))  # a name that others end with


def _match(pattern: str, name: str) -> bool:
    """Return whether PEFT takes this pattern of ranks or alphas for a module of this name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def is_saved(saved: Iterable[str] | None, module: str) -> bool:
    """Return whether PEFT saves all of a module: its name, or that of one it is in, ends so."""
    parts = module.split(".")
    prefixes = [".".join(parts[: k + 1]) for k in range(len(parts))]
    return any(prefix.endswith(name) for name in saved or () for prefix in prefixes)


def matches(names: Sequence[str] | str, name: str) -> bool:
    """Return whether PEFT takes a module of this name: by its full or last names, or a regex."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in names)


def name_others(targets: Sequence[str] | str, name: str, others: Iterable[str]) -> bool:
    """Return whether all targets that name a module name one of the others as well."""
    names = [targets] if isinstance(targets, str) else [[t] for t in targets if matches([t], name)]
    return all(any(matches(target, other) for other in others) for target in names)


def refused_by_vllm(config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """List what vLLM would refuse of an adapter."""
    refused = []
    if config["bias"] != "none":
        refused.append(f"bias={config['bias']!r}: it has no trained biases")
    if config.get("use_dora"):
        refused.append("DoRA: merge instead, or train without")
    if more := sorted(
        {n.rpartition(".")[2] for n in config.get("modules_to_save") or ()} - _VLLM_SAVES
    ):
        refused.append(f"fully trained modules, {more}: only {sorted(_VLLM_SAVES)}")
    if config.get("trainable_token_indices"):
        refused.append("rows of an embedding that train on their own")
    if (rank := max([config["r"], *config["rank_pattern"].values()])) > _VLLM_RANK:
        refused.append(f"rank {rank}: at most {_VLLM_RANK}")
    patterns = {*config["rank_pattern"], *config["alpha_pattern"]}
    if keys := sorted(key for key in patterns if key.startswith("^")):
        refused.append(
            f"patterns that anchor a name others end with, {keys[:3]}: not known to work"
        )
    if heads := sorted(name for name in tensors if name.endswith("lm_head.weight")):
        refused.append(f"a full {heads[0]}")
    return refused


def check(config: Any, where: str) -> dict[str, Any]:
    """Return a configuration that we can read exactly, with PEFT's defaults for missing keys.

    Raises:
        ValueError: it is none of LoRA's, has values of wrong types, or a key that would make the
            numbers mean something else here.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: expected an object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{where}: peft_type is {config.get('peft_type')!r}, and only 'LORA' can be read here"
        )
    for name, kind in _KNOWN.items():
        value = config.get(name)
        is_bool = isinstance(value, bool) and kind not in (bool, _KNOWN["init_lora_weights"])
        if value is not None and (is_bool or not isinstance(value, kind)):
            raise ValueError(f"{where}: {name} is {value!r}, expected {_words(kind)}")
    for name, value in config.items():
        if name in _KNOWN or name in _HARMLESS or value in (None, False, {}, []):
            continue
        if name in _VARIANTS:
            raise ValueError(
                f"{where}: {name}={value!r:.60} is a variant of LoRA that cannot be read here. Let "
                "PEFT merge it into the model, or extract a plain adapter from that"
            )
        raise ValueError(
            f"{where}: {name}={value!r:.60}: PEFT {VERSION} has no such key and would pass over "
            "it; whether it changes what the adapter computes is not known. If it does not, delete "
            f"it from {CONFIG}"
        )
    defaults = {"r": 8, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}
    empty = {"rank_pattern": {}, "alpha_pattern": {}, "peft_version": ""}
    config = defaults | empty | {k: v for k, v in config.items() if v is not None}
    for name in ("rank_pattern", "alpha_pattern"):
        kind = int if name == "rank_pattern" else int | float
        for pattern, value in config[name].items():
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{where}: {name}[{pattern!r}] is {value!r}, expected a number")
            _compiled(f"(.*\\.)?({pattern})$", f"{where}: {name}")
    for rank in (config["r"], *config["rank_pattern"].values()):
        if not 0 < rank < _LARGEST:
            raise ValueError(f"{where}: rank {rank!r:.20}, expected a positive number")
    for alpha in (config["lora_alpha"], *config["alpha_pattern"].values()):
        if not -_LARGEST < alpha < _LARGEST:
            raise ValueError(f"{where}: alpha {alpha!r:.20}, expected a finite number")
    patterns = config.get("layers_pattern") or ()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        _compiled(f"(?:^|.*?\\.){pattern}\\.", f"{where}: layers_pattern")
    if config["bias"] not in ("none", "all", "lora_only"):
        raise ValueError(f"{where}: bias={config['bias']!r}: expected 'none', 'all' or 'lora_only'")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str):
            _compiled(config[name], f"{where}: {name}")
    for pattern in config.get("modules_to_save") or ():
        _compiled(str(pattern), f"{where}: modules_to_save")
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        if not all(isinstance(x, str) for x in config.get(name) or ()):
            raise ValueError(f"{where}: {name} is {config[name]!r}, expected a list of names")
    init = config["init_lora_weights"]
    if init not in _PLAIN and init not in REDONE:
        raise ValueError(
            f"{where}: init_lora_weights={init!r} changes the base when PEFT loads it, in a way "
            "that cannot be repeated here. Save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    return config


def _words(kind: Any) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Return the rank of a module or parameter of this name."""
    return int(_of(config["rank_pattern"], name, config["r"]))


def scale_of(config: Mapping[str, Any], name: str) -> np.float32:
    """Return what its update is multiplied by."""
    rank = rank_of(config, name)
    alpha = _of(config["alpha_pattern"], name, config["lora_alpha"])
    return np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _of(patterns: Mapping[str, Any], name: str, usual: Any) -> Any:
    found = (value for pattern, value in patterns.items() if _match(pattern, name))
    return next(found, patterns.get(name, usual))


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Return whether PEFT would adapt a module of this name."""
    if config.get("exclude_modules") and matches(config["exclude_modules"], name):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){pattern}($|\..*)", name) for pattern in saved):
        return False
    targets = config.get("target_modules", [])
    if targets != "all-linear" and not matches(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str) or name in targets:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", name) for pattern in patterns]
    if not patterns:
        found = [re.match(r".*?\.[^.]*\.(?P<layer>\d+)\.", name)]
    first = next(filter(None, found), None)
    return first is not None and int(first["layer"]) in layers


def has_head(config: Mapping[str, Any]) -> bool | None:
    """Return whether an adapter's model has a head for tokens: by its task, or by its class.

    None: neither is known. PEFT writes the class where there is no task.
    """
    if (task := config.get("task_type")) is not None:
        return None if task not in TASKS else task in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    known = config.get("auto_mapping")
    if isinstance(known, Mapping) and str(known.get("parent_library")).startswith("transformers."):
        return HEADED.fullmatch(str(known.get("base_model_class"))) is not None
    return None


def ties_adapters(config: Mapping[str, Any], module: str) -> bool:
    """Return whether PEFT gives the adapter of a table to the head that is tied to it, too."""
    return bool(config.get("ensure_weight_tying")) and module.rpartition(".")[2] == "embed_tokens"


def target_parameters(config: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Find the parameters that PEFT would adapt, among these names."""
    return {name for name in names if matches(config.get("target_parameters") or [], name)}
