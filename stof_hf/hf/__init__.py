"""The integration with Transformers: functions named "stof", and patterns on models."""

__all__ = ["register"]


def register() -> None:
    """Register "stof" with Transformers; `import stof_hf` sees to it. Again, it changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from .attention import stof_attention
    from .check import install
    from .masks import stof_mask
    from .paged import paged_attention, paged_mask

    AttentionInterface.register("stof", stof_attention)
    AttentionMaskInterface.register("stof", stof_mask)
    # Transformers before 5.23 prepends this prefix for continuous batching.
    AttentionInterface.register("paged|stof", paged_attention)
    AttentionMaskInterface.register("paged|stof", paged_mask)
    install()


# Importing it registers "stof", which imports the modules here: first, while none is half imported.
import transformers.modeling_utils  # noqa: E402, F401
