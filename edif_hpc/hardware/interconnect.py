"""What NCCL and RCCL are told about the network between nodes, as data: one short table per fabric and accelerator.

Both libraries find most of it by themselves, and a variable too many makes them hang, so each one here has its source
beside it. Left out on purpose:

- NCCL_NET_GDR_LEVEL: PHB and SYS made jobs hang on LUMI, and performance was good without it
  (github.com/lumi-ai-factory/laifs-container-recipes/issues/30, also /issues/28).
- NCCL_NET="AWS Libfabric": it makes NCCL fail where the plugin is not in the image (docs.cscs.ch, "NCCL"), and ours
  have none. Whoever binds aws-ofi-nccl or aws-ofi-rccl in, binds it to where the image's loader looks: LD_LIBRARY_PATH
  does not go into the container.
- What NVIDIA's guide calls debugging parameters: "should not be used in production".

None of this was run on any of these fabrics.
"""

from __future__ import annotations

from types import MappingProxyType

from edif_hpc.core.pools import Pool

HSN = "hsn0,hsn1,hsn2,hsn3"
"""The four Slingshot cards of a LUMI-G node: github.com/Lumi-supercomputer/lumi-userguide,
docs/software/packages/pytorch.md, and LUMI-AI-Guide, 5-multi-gpu-and-node/run_ddp_torchrun.sh."""

# RCCL reads NCCL's variables by the same names: rocm.docs.amd.com/projects/rccl.
_SOCKETS = {
    # 1: no InfiniBand or RoCE, IP sockets instead. NCCL user guide, "Environment Variables".
    "NCCL_IB_DISABLE": "1",
}

FABRICS = MappingProxyType(
    {
        # Nothing is said: one node needs no network, and elsewhere the libraries look for themselves.
        ("none", "cuda"): {},
        ("none", "rocm"): {},
        # Plain IP sockets. RoCE is `infiniband` to these libraries, although it runs on Ethernet.
        ("ethernet", "cuda"): _SOCKETS,
        ("ethernet", "rocm"): _SOCKETS,
        # Found and used by themselves. Which adapters serve the GPUs differs by site: the pool's `adapters`.
        ("infiniband", "cuda"): {},
        ("infiniband", "rocm"): {},
        ("slingshot", "cuda"): {
            # A prefix, which takes all cards: docs.isambard.ac.uk, guides/example-data/nccl/env_vars.sh.
            "NCCL_SOCKET_IFNAME": "hsn",
            # These four stand both there and in github.com/eth-cscs/cscs-docs,
            # docs/software/communication/nccl_env_vars.
            "NCCL_CROSS_NIC": "1",
            "FI_CXI_DEFAULT_CQ_SIZE": "131072",
            "FI_CXI_DISABLE_HOST_REGISTER": "1",
            "FI_MR_CACHE_MONITOR": "userfaultfd",
        },
        ("slingshot", "rocm"): {
            "NCCL_SOCKET_IFNAME": HSN,
            # Against hangs in containers: github.com/Lumi-supercomputer/LUMI-AI-Guide/pull/118.
            "FI_MR_CACHE_MONITOR": "userfaultfd",
        },
    }
)


def variables(pool: Pool) -> dict[str, str]:
    """The environment of this pool's workers as far as it is about the network; empty for a CPU pool.

    A pool's own `adapters` and `interfaces` take the place of what stands here.
    """
    found = dict(FABRICS.get((pool.interconnect, pool.accelerator), {}))
    if pool.adapters:
        found["NCCL_IB_HCA"] = pool.adapters
    if pool.interfaces:
        found["NCCL_SOCKET_IFNAME"] = pool.interfaces
    return found
