"""Whether all ranks have the same items by name: the sites of a plan, the checksums of weights."""

import hashlib
from collections import Counter
from collections.abc import Mapping

from fgtp_pass.agreement.meeting import Meeting
from fgtp_pass.agreement.message import Intent
from fgtp_pass.errors import AgreementError

_SHOWN = 4


def require_same_items(meeting: Meeting, items: Mapping[str, str], what: str, advice: str) -> None:
    """Raise AgreementError on every rank, with what differs where, unless all have the same items.

    Collective, as `differing_items` is.
    """
    odd = differing_items(meeting, items)
    if odd:
        raise AgreementError(f"{what} {odd}. {advice}", shared=True)


def differing_items(meeting: Meeting, items: Mapping[str, str]) -> str:
    """Which ranks have other items than the others, in words; an empty string if none has.

    items: by name. Collective. A digest of all travels; the items only where it differs.
    """
    text = "\n".join(f"{name} {value}" for name, value in items.items())
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    messages = meeting.exchange(Intent.SHARD, payload=digest)
    if len({message.payload for message in messages}) == 1:
        return ""
    messages = meeting.exchange(Intent.SHARD, payload=dict(items))
    return _some(_differences({message.rank: message.payload for message in messages}), "; ")


def _differences(by_rank: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Which ranks have other items than most do, or than the first where there is no most."""
    names = dict.fromkeys(name for items in by_rank.values() for name in items)
    usual = {
        name: Counter(items.get(name) for items in by_rank.values()).most_common(1)[0][0]
        for name in names
    }
    differing = {
        rank: [name for name in names if items.get(name) != usual[name]]
        for rank, items in by_rank.items()
    }
    same = [f"rank {rank}" for rank, found in differing.items() if not found]
    reference = _some(same) or "what most ranks have"
    odd = [
        f"rank {rank} differs from {reference} in {_some(found)}"
        for rank, found in differing.items()
        if found
    ]
    return odd or ["they have them in another order"]


def _some(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
