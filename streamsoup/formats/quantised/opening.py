"""Open a checkpoint so that its quantised weights are read as what they stand for."""

from __future__ import annotations

from streamsoup.errors import FormatError
from streamsoup.formats.configs import Quantisation, config_folder, quantisation
from streamsoup.formats.quantised.causes import advice_for, refused_method
from streamsoup.formats.quantised.dequantised import Dequantised
from streamsoup.formats.quantised.layouts import find_weights
from streamsoup.formats.source import Source

__all__ = ["dequantised"]


def dequantised(source: Source) -> Source:
    """Return a source of the values of quantised weights; the same source if it has none.

    Raises:
        FormatError: The weights are quantised in another way than `layouts` knows, or what is
            stored of them contradicts itself or the configuration.

    Reads the configuration beside it.
    """
    told = quantisation(config_folder(source)) or Quantisation("", {})
    refused = refused_method(told.says)
    if refused is not None:
        raise FormatError(f"{told.where}: {refused}")
    found = find_weights(source.tensors, told.says, source.where)
    if found.by_name:
        return Dequantised(source, found)
    if told.where:
        raise FormatError(
            f"{told.where}, so the model is quantised, but no tensor has codes and scales that are "
            f"known here; {advice_for(source.tensors)}"
        )
    return source
