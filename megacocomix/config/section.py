"""The base class of every section of the config, and the number types of its options."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A section of the config. It refuses unknown keys, never coerces types silently, and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    def with_defaults(self, defaults: dict[str, Any]) -> Self:
        """A copy in which every null option that is in `defaults` has its value from there."""
        return self.model_copy(update={key: value for key, value in defaults.items() if getattr(self, key) is None})
