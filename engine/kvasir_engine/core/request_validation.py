"""Checks requests of routers against this worker's model and limits. Each error names its field. Pure.

The wire's types already refuse what no worker could serve.
"""

from collections.abc import Sequence

from kvasir_engine.connector.layout import spec_of
from kvasir_engine.protocol import Endpoint, Lease, Loan, Sampling
from kvasir_engine.sampling.processor_validation import fault_of_processors


def fault_of_prompt(tokens: Sequence[int], sampling: Sampling, vocab: int, grammars: bool = False) -> str | None:
    """Why a request does not fit a model of `vocab` tokens, or a worker that compiles no `grammars`."""
    if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
        return f"tokens: a prompt is one or more tokens from 0 to {vocab - 1}"
    if sampling.max_tokens < 1:
        return f"max_tokens must be at least 1, not {sampling.max_tokens}"
    stops = sampling.stop_token_ids
    if stops and not 0 <= min(stops) <= max(stops) < vocab:
        return f"stop_token_ids: tokens are from 0 to {vocab - 1}"
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= vocab:
        return f"logprobs: there are {vocab} tokens, not {sampling.logprobs}"
    if sampling.prompt_logprobs is not None and sampling.prompt_logprobs > vocab:
        return f"prompt_logprobs: there are {vocab} tokens, not {sampling.prompt_logprobs}"
    if sampling.processors is not None and sampling.processors.replayed >= len(tokens):
        return f"replayed: {sampling.processors.replayed} of {len(tokens)} tokens, of which one is the prompt's"
    if sampling.grammar is not None and not grammars:
        return "grammar: this worker compiles none"
    if fault := fault_of_processors(sampling, vocab):
        return f"{fault[0]}: {fault[1]}"
    return None


def fault_of_endpoint(field: str, peer: Endpoint, ours: Endpoint) -> str | None:
    """Why KV cannot move between the worker `peer`, given in the field of this name, and this one, `ours`."""
    if peer.others and len(peer.others) != peer.fingerprint.tensor_parallel - 1:
        ranks = peer.fingerprint.tensor_parallel
        return f"{field}.others: {1 + len(peer.others)} ranks are named, tensor_parallel is {ranks}"
    agents = {ours.agent_of(rank) for rank in range(ours.fingerprint.tensor_parallel)}
    if agents & {peer.agent, *(each.agent for each in peer.others)}:
        return f"{field}.agent: {peer.agent} is this worker itself"
    regions = [peer.region, *(each.region for each in peer.others)]
    if len({region.pages for region in regions}) > 1:
        return f"{field}.others: page numbers mean the same on all ranks, which have different numbers of pages"
    for region in regions:
        try:
            spec_of(peer.fingerprint, region.page_bytes)
        except ValueError as error:
            return f"{field}.region.{error}"
    return None


def fault_of_lease(lease: Lease, holder: Endpoint) -> str | None:
    """Why `holder` cannot have granted a lease or its loan."""
    problem = _fault_of_pages("lease", lease, holder)
    if problem is None and lease.loan is not None:
        if lease.loan.id == lease.id:
            return "lease.loan.id: it is the lease's"
        problem = _fault_of_pages("lease.loan", lease.loan, holder)
    return problem


def _fault_of_pages(field: str, lease: Lease | Loan, holder: Endpoint) -> str | None:
    if lease.epoch != holder.epoch:
        return f"{field}.epoch: {lease.epoch}, its holder is in epoch {holder.epoch}"
    pages = holder.region.pages
    if lease.pages and not 0 <= min(lease.pages) <= max(lease.pages) < pages:
        return f"{field}.pages: its holder has pages 0 to {pages - 1}"
    if len(set(lease.pages)) != len(lease.pages):
        return f"{field}.pages: a page is named twice"
    if lease.first % holder.fingerprint.page_size:
        return f"{field}.first: {lease.first} is no multiple of its holder's page_size"
    return None
