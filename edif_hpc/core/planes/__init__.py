"""A lossless format for results: any bytes, in independent blocks, each split into byte planes before zstd sees it.

Neighbouring floats share the byte of their exponents and little else. zstd gains from that only where these bytes lie
together, and once they do, its search for repeats is of no use: Huffman codes alone are smaller and twice as fast. The
bytes are in practice a file of torch.save, whose storages begin at multiples of 64; this module knows of no tensors.

    "EDIFPLN1"   u64 raw size
    per block    u32 raw length   u32 coded length   u32 stride   the coded bytes
    in these     u32 coded length of each plane   the planes   the bytes left over behind a multiple of the stride

Little-endian. All blocks but the last have the length of the first. Plane p has the bytes p, p + stride, p + 2 stride
and so on; it is one zstd frame, or stored as it is where its length says so. With stride 0 the whole block is stored.

zstandard and numpy are imported on first use: gateway and command line do without. Ratio, MB a second in and out of one
thread's CPU time on a Xeon, for hidden states of SmolLM2 (1024 tokens of English, 31 layers) and its logits:

                     zstd-1            zstd-3            planes
    hidden bf16      1.30  868  865    1.30  725  869    1.47  793 1179
    hidden float32   1.10  783 1023    1.10  429  887    1.21 1220 1611
    logits bf16      1.48  686  974    1.54  148  693    1.72  488  860
    logits float32   1.14  686  939    1.14  384  829    1.25  773 1189
"""

from .decoder import Decoder, decode, decode_file
from .encoder import Encoder, encode
from .layout import MAGIC, header

__all__ = ["MAGIC", "Decoder", "Encoder", "decode", "decode_file", "encode", "header"]
