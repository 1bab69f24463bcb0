"""What the mixins of trainers are derived from."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer as TrainerMixin  # so that a type checker knows what a mixin finds in `self`
else:

    class TrainerMixin:
        """A class that is mixed into a transformers Trainer, whose methods it extends and whose attributes it uses."""
