"""ImageNet, 224x224, streamed: final training of cells found on CIFAR-10.

python -m cpnas_jax.main --config=configs/imagenet.py:train --config.genotype=FILE --workdir=gs://...

The paper's network uses the cells found on CIFAR-10 (our reading: its published search cost is the
same), so there is no search here. Any other tfds set of images with one label each is trained the
same way: --config.dataset.name=NAME --config.dataset.image_size=SIZE, and
--config.evaluate.split=test where there is no split `validation`.
"""

from ml_collections import config_dict

from cpnas_jax.config import apply_argument, base_config

MODES = ("train", "evaluate", "summary", "report", "export", "predict")


def get_config(argument: str | None = None) -> config_dict.ConfigDict:
    """Return the config of `mode,size,plus,smoke`, see `config.apply_argument`."""
    config = base_config()
    config.dataset.update(
        name="imagenet2012",  # [paper]
        image_size=224,  # [kin]
        stream=True,  # [ours]
        crop_padding=0,  # random resized crops instead [kin]
        cutout=0,  # [kin]
        color_jitter=0.4,  # brightness, contrast and saturation; half of it for the hue [kin]
    )
    config.network.update(
        cells=10,  # [ours]
        channels=100,  # [ours]
        stem="imagenet",  # [kin]
        drop_path=0.0,  # [kin]
    )
    config.train.update(
        epochs=250,  # [paper]
        batch_size=512,  # over all devices; more on a pod: 512 or more [paper]
        reference_batch=512,  # rates grow with the batch [kin]
        warmup_epochs=5,  # [kin]
        label_smoothing=0.1,  # [kin]
        auxiliary_weight=0.4,  # [kin]
        evaluate_every=5,  # [ours]
    )
    # Evaluating needs no gradient, so larger batches fit [ours].
    config.evaluate.update(split="validation", batch_size=512)
    config.runtime.checkpoint_every = 500  # an epoch is long: 2,502 steps [ours]
    apply_argument(config, argument, default_mode="train", modes=MODES)
    return config
