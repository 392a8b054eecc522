"""Every config key, with its evidence, and the check of all values before anything runs.

Evidence: [paper] stated by CP-NAS; [kin] from DARTS, PC-DARTS or the same group's later code;
[ours] our choice. The files in `configs/` change a handful of these values.
"""

import difflib
import os
import re
from collections.abc import Sequence

from ml_collections import config_dict

from cpnas_jax.architecture.sampling import num_paths
from cpnas_jax.config_keys import flatten
from cpnas_jax.config_rules import MODES, RULES, check_gradient_strategy, check_sampled_strategy
from cpnas_jax.models.space import OPERATIONS
from cpnas_jax.runtime.board import require_package
from cpnas_jax.runtime.errors import UserError

PLUS = ("residual", "prelu", "first_norm")
"""The levers of `plus`: those of DCP-NAS' code that leave activations at one bit.

What each gives is measured in docs/results.md.
"""


def base_config() -> config_dict.ConfigDict:
    """Return all keys with the values of the CIFAR-10 search."""
    config = config_dict.ConfigDict()
    config.mode = "search"  # what to run, one of MODES [ours]
    config.seed = 0  # decides data parts, order, augmentation, weights and permutations [ours]

    # What to train: a genotype file, or a name of architecture/named.py; "" is the workdir's own
    # [ours].
    config.genotype = ""

    config.dataset = dataset = config_dict.ConfigDict()  # [ours], but for what is said below
    dataset.name = "cifar10"  # a tfds image classification set, or mnist5k
    dataset.data_dir = ""  # where tfds keeps prepared sets; "" is TFDS_DATA_DIR or tfds' default
    dataset.image_size = 0  # resize to this many pixels a side; 0 keeps the stored size
    dataset.stream = False  # decode while training, for sets that memory does not hold
    dataset.workers = 0  # processes that decode a stream; 0 uses threads
    dataset.max_undecodable = 0  # damaged examples of a split that are skipped before a stop [ours]
    dataset.crop_padding = 4  # black border of the random crop [kin]
    dataset.flip = True  # random horizontal flip [kin]
    dataset.cutout = 16  # side of the square cut out in final training [kin]; 0 cuts nothing
    dataset.color_jitter = 0.0  # in final training; 0.4 on ImageNet [kin]
    dataset.crop_area = 0.08  # least share of an image in a stream's random resized crop [kin]
    dataset.central_crop = 0.875  # share of a side that a stream's evaluation keeps [kin]

    config.search = search = config_dict.ConfigDict()
    # cp: Algorithm 9 [paper]; child: by the child alone, beta_P = 0 [paper: BNAS]; random: an
    # architecture drawn at random; random_search: the best of `candidates` at cp's cost [ours];
    # cp_plus: many scored architectures, shared credit, certain drops [ours]
    search.strategy = "cp"
    search.candidates = 7  # of random_search [ours]
    # Of cp_plus, see docs/indicator.md.
    search.plus_beta_p = 0.0  # of its z, in place of beta_p; 0 trains the child alone [ours]
    search.measure = "accuracy"  # what z is made of: accuracy or log_likelihood [ours]
    search.max_scored = 560  # architectures that are scored at most, shared by the stages [ours]
    search.plus_score_examples = 2500  # images they are scored on, if score_examples is 0 [ours]
    search.reliability = 0.8  # of the credit, at which a stage has scored enough [ours]
    search.certainty = 0.99  # at which more than an edge's worst operation is dropped [ours]
    search.carry = 1.0  # weight of a score one stage later [ours]
    search.plus_training = 2  # times T rounds at K, K/2, ...; the child alone has twice that [ours]
    search.plus_paths = "step"  # a path is trained for an epoch, as in cp, or a step [ours]
    # data: the devices share each batch [paper: one device]; path: each group of devices trains
    # another architecture of a round at the same time, see docs/devices.md [ours]
    search.parallel = "data"
    search.beta_p = 2.0  # eq. 4.15; 2 is the best of the paper's ablation [paper]
    search.rounds = 3  # T, rounds of a stage [kin]
    search.examples = 0  # use so many of the train split, an equal share a class; 0: all [ours]
    search.validation_fraction = 0.5  # of them, for scoring [kin]
    search.operations = OPERATIONS  # the K operations every edge starts with [paper]
    search.cells = 6  # [kin]
    search.channels = 16  # C of the first cell [kin]
    search.reductions = (1, 3)  # positions of the reduction cells [kin]
    search.separable_repeats = 2  # units of a sep_conv: 2 [kin], or 1 as figure 4.8 draws it
    search.binary_preprocess = True  # 1-bit 1x1 preprocessing in the child [ours]
    search.batch_size = 256  # global, over all devices [kin]
    search.score_batch_size = 256  # global; scoring normalises by these batches [ours]
    search.score_examples = 0  # score on the first so many of the validation part; 0: all [ours]
    search.learning_rate = 0.1  # cosine to 0 over the whole search [kin]
    search.momentum = 0.9  # [kin]
    search.weight_decay = 3e-4  # [kin]
    search.gradient_clip = 5.0  # global norm [kin]
    search.child_optimizer = "sgd"  # as the parent [kin]; adam learns faster at 1 bit [ours]
    search.child_learning_rate = 0.1  # as the parent [kin]; about 0.002 with adam [ours]
    # The gradient strategies: darts, pc_darts (its switches are of it alone) and cp_gradient.
    search.epochs = 50  # of the whole search; learning rates go to 0 over them [kin]
    search.alpha_learning_rate = 6e-4  # of alpha's Adam; DARTS has 3e-4, PC-DARTS this [kin]
    search.alpha_weight_decay = 1e-3  # of alpha [kin]
    search.alpha_warmup = 15  # epochs in which alpha does not move; darts has none [kin]
    search.gradient_model = "child"  # that darts and pc_darts train: what is searched for [ours]
    search.second_order = False  # alpha also counts what it changes in the weights, as DARTS [kin]
    search.partial_channels = 4  # of pc_darts: operations see C // 4 channels [kin]
    search.edge_normalisation = True  # of pc_darts: a node weights its incoming edges [kin]
    # Of cp_gradient, in -(w_P * LL_P + w_C * LL_C) [ours]. Eq. 4.15 with beta_P = 2 would be 2 and
    # -1: a child that is worse would then count as better, and a gradient finds that.
    search.child_weight = 0.5  # w_C [ours]
    search.parent_weight = 0.5  # w_P [ours]
    search.gate_temperature = 1.0  # of cp_gradient's gates; GDAS goes from 10 to 0.1 [ours]
    # The log warns when skip, pooling and none are a larger share of what survives [ours].
    search.collapse_share = 0.75
    search.max_skips = -1  # skip connections of a derived cell at most as P-DARTS [kin]; -1: any
    search.edge_policy = "all"  # all 14 edges as Algorithm 9 prints it [paper], or top2 [kin]

    config.network = network = config_dict.ConfigDict()
    network.cells = 10  # of the discrete network; reductions at 1/3 and 2/3 of the depth [ours]
    network.channels = 100  # C of the first cell; with top2 edges 10 to 11 M parameters [ours]
    network.precision = "binary"  # binary: the 1-bit child [paper]; float: the parent
    network.stem = "cifar"  # cifar: a 3x3 convolution; imagenet: three of stride 2 [kin]
    network.auxiliary = True  # auxiliary classifier after cell 2L // 3 [kin]
    network.drop_path = 0.2  # its rate at the end of training, from 0 [kin]
    network.separable_repeats = 2  # units of a sep_conv: 2 [kin], or 1 as figure 4.8 draws it
    network.binary_preprocess = True  # 1-bit 1x1 preprocessing in the child [ours]
    network.normalize_pools = True  # BN after pooling, as in the search [kin]
    network.recompute = False  # convolutions anew in the backward pass: half the memory [ours]
    network.residual = False  # x + unit(x) over each separable unit at stride 1 [kin]
    network.prelu = False  # PReLU after the BN of a unit [kin]
    network.first_norm = False  # BN before a unit's first sign [kin]
    network.real_depthwise = False  # depthwise convolutions see real activations [kin]
    network.learnable_sign = False  # a threshold for each channel's sign, of ReActNet [ours]
    network.learnable_prelu = False  # PReLU with shifts for each channel, of ReActNet [ours]

    config.train = train = config_dict.ConfigDict()
    train.examples = 0  # as search.examples; of a stream the first so many [ours]
    train.epochs = 600  # [paper]
    train.batch_size = 128  # global, over all devices [paper]
    train.learning_rate = 1e-3  # of the child, by Adam; cosine to 0 [kin]
    train.weight_decay = 0.0  # of the child's float kernels alone [ours]
    train.float_learning_rate = 0.025  # of a float network, by SGD; cosine to 0 [kin]
    train.float_weight_decay = 3e-4  # of all parameters of a float network [kin]
    train.momentum = 0.9  # of SGD [kin]
    train.warmup_epochs = 0  # linear from 0; 5 on ImageNet [kin]
    train.reference_batch = 0  # scale rates by batch_size / reference_batch; 0 does not [kin]
    train.gradient_clip = 5.0  # global norm [kin]
    train.label_smoothing = 0.0  # 0.1 on ImageNet [kin]
    train.auxiliary_weight = 0.4  # of the auxiliary classifier's loss [kin]
    train.reconstruction_weight = 1e-4  # of the kernels' term of L_H, eq. 4.17 [ours]
    train.center_weight = 1e-3  # lambda, of the features' term of L_H, eq. 4.18 [ours]
    train.parent_kernel = False  # H are the kernels of a float parent trained beside [ours]
    train.real_weights_epochs = 0  # first part of two-step training: 1-bit activations alone [kin]
    train.average_decay = 0.0  # of a moving average of the weights to evaluate; 0: none [ours]
    train.evaluate_every = 10  # epochs between evaluations on evaluate.split [ours]

    config.evaluate = evaluate = config_dict.ConfigDict()
    evaluate.split = "test"  # what `evaluate`, and training on its way, count [ours]
    evaluate.examples = 0  # use so many of that split, as train.examples; 0 uses all [ours]
    evaluate.checkpoint = "last"  # last, as nothing chose it by the test split, or best [ours]
    evaluate.batch_size = 256  # global, over all devices [ours]

    config.export = export = config_dict.ConfigDict()  # all of it [ours]
    export.directory = ""  # that `export` writes and `predict` reads; "" is `export` in --workdir
    export.iree = ()  # compiled ahead for host, aarch64 too; needs the extra `iree`

    config.predict = predict = config_dict.ConfigDict()  # all of it [ours]
    predict.images = ""  # image files and folders, with commas between
    predict.top = 5  # likeliest classes that are told
    predict.format = "table"  # or json
    predict.engine = "xla"  # or iree, where it was exported for host
    predict.batch_size = 64  # images that are classified together

    config.binarizer = binarizer = config_dict.ConfigDict()
    binarizer.activation_estimator = "bireal"  # [kin]
    binarizer.weight_estimator = "clip"  # [kin]
    binarizer.weight_scale = "channel"  # mean |H| of each output channel [kin]
    binarizer.pad_value = 0.0  # around the signs: 0 [kin], or +1 for packed inference [ours]

    config.compare = compare = config_dict.ConfigDict()  # all of it [ours]
    compare.strategies = ("cp", "child", "random_search", "random")  # in this order
    compare.seeds = (0, 1, 2)  # of searches and trainings
    compare.beta_p = ()  # cp once for each; empty: for search.beta_p alone

    config.runtime = runtime = config_dict.ConfigDict()  # all of it [ours]
    runtime.steps_per_call = 50  # training steps in one call to the device
    runtime.keep_checkpoints = 2  # newest checkpoints kept
    runtime.checkpoint_every = 0  # training steps between checkpoints; 0: every epoch
    runtime.formulation = "auto"  # of depthwise convolution and pooling, by the backend
    runtime.optimization_level = 3  # of LLVM on a CPU; 1 compiles a quarter faster
    runtime.synchronise_statistics = True  # BN by the whole batch, not by each device's part
    # V > 0: every batch in V shards, added up in their order, for the same bits on any number of
    # devices that divides V; a shard has its own BN statistics. 0: as fast as it goes.
    runtime.deterministic = 0
    runtime.stall_seconds = 600.0  # without a step, until it is told what is waited for; 0: never
    runtime.tensorboard = False  # event files in <workdir>/tb; needs the extra `tensorboard`
    # Keep compiled programs in ~/.cache/cpnas_jax between runs; never for several CPU devices.
    runtime.compilation_cache = True
    return config.lock()


SIZES = {
    "small": {"cells": 10, "channels": 36},
    "medium": {"cells": 20, "channels": 36},
    "large": {"cells": 10, "channels": 100},
}
"""Networks by size: 1.4, 2.7 and 10.4 M parameters with the cells of DDPNAS_XNOR_1."""


def apply_argument(
    config: config_dict.ConfigDict,
    argument: str | None,
    default_mode: str,
    modes: tuple[str, ...] = MODES,
    sizes: dict[str, dict[str, int]] = SIZES,
) -> None:
    """Do what follows the colon of --config=file.py:mode,size,plus,smoke; to be called last.

    Args:
        config: changed in place.
        argument: words in any order; a mode, one of `sizes` for the final network, `plus` for its
            levers, `smoke` for a run of a minute.
        default_mode: without a word for it.
        modes: what the config offers.
        sizes: word -> keys of `config.network`.

    Raises:
        UserError: an unknown word, or a mode that this config does not offer.
    """
    config.mode = default_mode
    words = tuple(filter(None, (argument or "").split(",")))
    offered = (*modes, *sizes, "plus", "smoke")
    for word in words:
        if word in MODES and word not in modes:
            raise UserError(
                f"config argument {word!r}: this config has no {word}, only {', '.join(modes)}"
            )
        if word not in offered:
            raise UserError(
                f"config argument {word!r} is unknown; offered are {', '.join(offered)}"
            )
        if word in modes:
            config.mode = word
        elif word in sizes:
            config.network.update(sizes[word])
        elif word == "plus":
            config.network.update(dict.fromkeys(PLUS, True))
    if "smoke" in words:
        shrink(config)


def shrink(config: config_dict.ConfigDict) -> None:
    """Turn a config into a smoke test: every part of a phase, in about a minute on one CPU."""
    # The ImageNet stem halves three times, the cells twice.
    dataset = config.dataset
    dataset.image_size = 32 if config.network.stem == "imagenet" else 8
    dataset.crop_padding = min(dataset.crop_padding, 1)
    dataset.cutout = min(dataset.cutout, 2)
    if dataset.stream:
        config.train.examples, config.evaluate.examples = 1024, 512
    config.search.update(
        rounds=1,
        operations=("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"),
        # The normal cell's first input has twice its resolution: every kind of edge is there.
        cells=2,
        channels=4,
        reductions=(0,),
        batch_size=32,
        score_batch_size=32,
        separable_repeats=1,
        epochs=4,
        alpha_warmup=1,
        partial_channels=2,
    )
    config.network.update(cells=3, channels=4, separable_repeats=1)
    config.train.update(epochs=2, batch_size=32, evaluate_every=1, warmup_epochs=0)
    config.evaluate.batch_size = 32
    config.compare.seeds = (0,)
    # Of its four operations three are such from the beginning.
    config.search.collapse_share = 1.0
    # Compiling takes longer than the whole run.
    config.runtime.optimization_level = 0


def check_values(config: config_dict.ConfigDict) -> None:
    """Check every key against its rule.

    Raises:
        UserError: the first bad key, its value and what would be right.
    """
    for key in flatten(config):
        if key not in RULES:
            raise UserError(f"config.{key} is not a key; see cpnas_jax/config.py")
    for key, rule in RULES.items():
        value = config
        for part in key.split("."):
            if part not in value:
                raise UserError(f"config.{key} is missing; it must be {rule.words}")
            value = value[part]
        if not rule.test(value):
            raise UserError(f"config.{key} is {value!r}; it must be {rule.words}")


def validate(config: config_dict.ConfigDict, num_devices: int) -> None:
    """Check every key against its rule, and the keys against each other.

    Args:
        config: to be checked.
        num_devices: over all processes; they share each batch.

    Raises:
        UserError: the first bad key, its value and what would be right; a missing extra.
    """
    check_values(config)
    if config.runtime.tensorboard and config.mode in ("search", "train", "pipeline", "compare"):
        require_package()
    if config.genotype and config.mode in ("search", "pipeline", "compare"):
        raise UserError(
            f"config.genotype is {config.genotype!r}; with the mode {config.mode}, which searches "
            "the cells, it must be empty; the mode train takes it"
        )
    search = config.search
    outside = [position for position in search.reductions if not 0 <= position < search.cells]
    if outside:
        raise UserError(
            f"config.search.reductions is {tuple(search.reductions)!r}; with "
            f"config.search.cells={search.cells} positions are 0 to {search.cells - 1}"
        )
    check_gradient_strategy(search, config.runtime.deterministic)
    check_sampled_strategy(search)
    if config.compare.beta_p and "cp" not in config.compare.strategies:
        raise UserError(
            f"config.compare.beta_p is {config.compare.beta_p}; without cp among "
            f"config.compare.strategies={config.compare.strategies} it must be ()"
        )
    for name in ("warmup_epochs", "real_weights_epochs"):
        if config.train[name] >= config.train.epochs:
            raise UserError(
                f"config.train.{name} is {config.train[name]}; it must be below "
                f"config.train.epochs={config.train.epochs}"
            )
    if config.train.parent_kernel and not config.train.reconstruction_weight:
        raise UserError(
            "config.train.parent_kernel is True; the parent's kernels matter only with "
            "config.train.reconstruction_weight above 0"
        )
    if config.network.stem == "imagenet" and config.network.channels < 2:
        raise UserError(
            f"config.network.channels is {config.network.channels}; with "
            "config.network.stem=imagenet it must be at least 2"
        )
    searched = ("search.batch_size", "search.score_batch_size")
    trained = ("train.batch_size", "evaluate.batch_size")
    used = {
        **{"search": searched, "train": trained, "evaluate": trained, "export": trained},
        **{"summary": (), "predict": (), "report": ()},
    }
    shards = config.runtime.deterministic
    for key in used.get(config.mode, searched + trained):
        section, name = key.split(".")
        value, sharing = config[section][name], num_devices
        if section == "search" and search.parallel == "path":
            sharing //= num_paths(num_devices, len(search.operations))
        if shards % sharing:
            raise UserError(
                f"config.runtime.deterministic is {shards}; it must be a multiple of the "
                f"{sharing} devices that share the shards, or 0"
            )
        if shards and value % shards:
            raise UserError(
                f"config.{key} is {value}; it must be a multiple of "
                f"config.runtime.deterministic={shards}, the shards it is cut into"
            )
        if value % sharing:
            raise UserError(
                f"config.{key} is {value}; it must be a multiple of the "
                f"{sharing} devices that share it"
            )


def check_flags(argv: Sequence[str]) -> None:
    """Look at --config and its overrides before they are parsed, to name what is wrong with them.

    Raises:
        UserError: a config file that does not exist, or an override of an unknown key.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            path = (value if equals else following).partition(":")[0]
            if not path.startswith("-") and not os.path.isfile(path):
                raise UserError(f"--config={path} is no file; the configs are in configs/")
        elif name.startswith("config."):
            key = name.removeprefix("config.")
            if key not in RULED_KEYS:
                near = difflib.get_close_matches(key, RULED_KEYS, n=1)
                hint = f"did you mean config.{near[0]}?" if near else "see cpnas_jax/config.py"
                raise UserError(f"config.{key} is not a key; {hint}")


def explain(message: str) -> str:
    """Add to an error of a flag's value what the value must be."""
    # ml_collections puts the traceback of a config file's own error into the message.
    if "Traceback (most recent call last)" in message:
        # The last unindented "Type: text"; the text may go over several lines.
        last = re.split(r"\n(?=[\w.]+: )", message)[-1]
        message = "the config file raises " + " ".join(last.split())
    found = re.search(r"--config\.([\w.]+)", message)
    if not found or found[1] not in RULES:
        return message
    return f"{message}; config.{found[1]} must be {RULES[found[1]].words}"


RULED_KEYS = frozenset(RULES)
"""Every key has a rule; a test compares this with `base_config`."""
