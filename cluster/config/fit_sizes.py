"""Fit the sizes that a YAML file leaves out to those that it gives, and to the model: pages, sparse cells, steps.

KV is shared by the page, and sparse rows come by the cell: a page divides the distance of DCA chunks, the cell and the
blocks of the KV store, and a step holds the largest cell. What is given stays as it is; `deployment` refuses what does
not fit then.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.config.schema import Config
from protos.model.grid import largest_cell
from protos.model.spec import ModelSpec


def fit_sizes(config: Config, spec: ModelSpec) -> tuple[Config, ModelSpec]:
    """Return both with `kv_cache.page_size`, `sparse.cell` and `prefill.max_num_batched_tokens` set to what fits.

    So is `kv_store.block_tokens`.
    """
    kv, prefill, store = config.kv_cache, config.prefill, config.kv_store
    step = prefill.max_num_batched_tokens if "max_num_batched_tokens" in prefill.model_fields_set else None
    cell_is_free = spec.sparse is not None and config.sparse.cell is None
    page = kv.page_size
    if "page_size" not in kv.model_fields_set:
        multiples = [spec.chunk_distance]  # 0: any page divides it
        if spec.sparse is not None and not cell_is_free:
            multiples.append(spec.sparse.cell)
        if "block_tokens" in store.model_fields_set:
            multiples.append(store.block_tokens)
        while any(size % page for size in multiples) or (cell_is_free and step is not None and page > step):
            page //= 2
    if spec.sparse is not None and cell_is_free:
        cell = spec.sparse.cell
        if step is not None and largest_cell(spec) > step:
            cell = step
        spec = replace(spec, sparse=replace(spec.sparse, cell=max(cell // page, 1) * page))
    if step is None:
        step = max(prefill.max_num_batched_tokens, largest_cell(spec))
    kv = kv.model_copy(update={"page_size": page})
    prefill = prefill.model_copy(update={"max_num_batched_tokens": step})
    if "block_tokens" not in store.model_fields_set:
        store = store.model_copy(update={"block_tokens": max(store.block_tokens, page)})
    return config.model_copy(update={"kv_cache": kv, "prefill": prefill, "kv_store": store}), spec
