"""Settings of a retraining from a file: what it names, over those that the domain has.

Knows the form of a generation's manifest; nothing of training. A new part of that form needs
nothing here.
"""

from typing import Any

from conch_dna.errors import ConchError
from conch_dna.generations.settings import MAPPINGS, EvolveConfig
from conch_dna.option_fields import named_settings


def settings_over(
    settings: EvolveConfig,
    manifest: dict[str, Any],
    *,
    source: str,
    trust_remote_code: bool = False,
) -> EvolveConfig:
    """Settings with what a file names instead.

    Args:
        settings: As the domain would be retrained without the file.
        manifest: Parts of a generation's manifest, see `EvolveConfig.from_manifest`.
        source: Where they come from, for the message.
        trust_remote_code: Let Python code that comes with a model run.

    Raises:
        ConchError: See `EvolveConfig.from_manifest`; or the file asks for a line or data.
    """
    if "evolution_request" in manifest:
        raise ConchError(
            f"{source} has an evolution_request: a retraining learns from what was recorded of its "
            "domain; leave it out"
        )
    base = settings.to_manifest()
    merged = {"laws": base["laws"], **manifest}
    for name in MAPPINGS:
        given = manifest.get(name) or {}
        # What is no mapping is refused below.
        if isinstance(given, dict):
            where, aliases = f"{source}, {name},", {"iters": "num_iters"}
            named = named_settings(given, base[name], source=where, aliases=aliases)
            merged[name] = {**base[name], **named}
    training = {"trust_remote_code": True} if trust_remote_code else None
    return EvolveConfig.from_manifest(merged, source=source, training=training)
