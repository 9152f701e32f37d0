"""How the ranks are spread over hosts."""

from collections import Counter
from weakref import WeakKeyDictionary

from fgtp_pass.agreement.control_group import all_ranks
from fgtp_pass.agreement.message import Intent
from fgtp_pass.collectives.groups import DataParallelGroup, hostname

_ranks_on_host: WeakKeyDictionary[DataParallelGroup, int] = WeakKeyDictionary()


def ranks_on_smallest_host(group: DataParallelGroup) -> int:
    """How many ranks the smallest host of the group has, which bounds "auto".

    Collective the first time that it is asked of a group.
    """
    if group not in _ranks_on_host:
        hosts = [hostname()]
        if group.size > 1:
            messages = all_ranks(group).exchange(Intent.SHARD, payload=hosts[0])
            hosts = [message.payload for message in messages]
        _ranks_on_host[group] = min(Counter(hosts).values())
    return _ranks_on_host[group]
