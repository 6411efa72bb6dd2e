"""How the chunks of a region are dealt to the members of a team, and where these run: code of `stitch.runtime.team`.

A member's share is the chunks from the first that it has left to the end, two i32 in one word. Members are alike, or
have weights, given as a table of i32:

    members, chunks, weight 0, weight 1, ...

The chunks, at most as many as the table says, are dealt in proportion to the weights. A member without weight takes no
part: it claims nothing, not even what others leave. The caller, which is member 0, must have one.

Whoever has done its own share takes of others', if it would be done before these come to it. One that is slow, of less
weight than the most, and needs n times as long for a chunk as all others together, leaves the last n - 1 to them: else
they would wait for it in the end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

SHARE, CPUS, LEAST = 16, 24, 32  # byte offsets in a member; CPUS: a pointer to bits of CPUs, null: it runs anywhere
ABSENT = 1  # the share of a member without weight: it ends before it begins, which no other share comes to
CPU_BYTES = 128  # of such bits, as in glibc's cpu_set_t

IR = """
; How many chunks a member may claim, if the word is this. Its share is read after the word, so it is that of this
; region, or the word is another one by now, and no claim succeeds.
define internal i64 @claimable(ptr %team, i64 %worker, i64 %word) {
  %left = and i64 %word, 4294967295
  %offset = mul i64 %worker, $MEMBER
  %plus = add i64 %offset, $SHARE_AT
  %share_at = getelementptr i8, ptr %team, i64 %plus
  %share = load atomic i64, ptr %share_at acquire, align 8
  %absent = icmp eq i64 %share, $ABSENT
  %begin = and i64 %share, 4294967295
  %end = lshr i64 %share, 32
  %own = icmp ult i64 %begin, %end
  %least_plus = add i64 %offset, $LEAST_AT
  %least_at = getelementptr i8, ptr %team, i64 %least_plus
  %least = load atomic i64, ptr %least_at monotonic, align 8
  %enough = icmp uge i64 %left, %least
  %may = or i1 %own, %enough
  %not_absent = xor i1 %absent, 1
  %both = and i1 %may, %not_absent
  %some = select i1 %both, i64 %left, i64 0
  ret i64 %some
}

; Give each member its share of the chunks: in proportion to its weight, or as many as any other.
define internal void @deal(ptr %team, i64 %size, i64 %chunks, ptr %table, i1 %weighted) {
entry:
  br i1 %weighted, label %sum, label %deal
sum:
  %k = phi i64 [0, %entry], [%k_next, %sum]
  %before = phi i64 [0, %entry], [%all_weights, %sum]
  %most_before = phi i64 [0, %entry], [%most, %sum]
  %k_next = add i64 %k, 1
  %weight_k_index = add i64 %k, 2
  %weight_k_at = getelementptr i32, ptr %table, i64 %weight_k_index
  %weight_k = load i32, ptr %weight_k_at
  %weight_k_wide = zext i32 %weight_k to i64
  %all_weights = add i64 %before, %weight_k_wide
  %most = call i64 @llvm.smax.i64(i64 %most_before, i64 %weight_k_wide)
  %summed = icmp sge i64 %k_next, %size
  br i1 %summed, label %deal, label %sum
deal:
  %total = phi i64 [%size, %entry], [%all_weights, %sum], [%total, %give]
  %greatest = phi i64 [1, %entry], [%most, %sum], [%greatest, %give]
  %member = phi i64 [0, %entry], [0, %sum], [%member_next, %give]
  %from = phi i64 [0, %entry], [0, %sum], [%to, %give]
  %so_far = phi i64 [0, %entry], [0, %sum], [%reached, %give]
  br i1 %weighted, label %look_up, label %give
look_up:
  %index = add i64 %member, 2
  %weight_at = getelementptr i32, ptr %table, i64 %index
  %weight_own = load i32, ptr %weight_at
  %weight_wide = zext i32 %weight_own to i64
  br label %give
give:
  %weight = phi i64 [1, %deal], [%weight_wide, %look_up]
  %member_next = add i64 %member, 1
  %reached = add i64 %so_far, %weight
  %all = mul i64 %reached, %chunks
  %half = lshr i64 %total, 1
  %less = sub i64 %total, 1
  %rest = select i1 %weighted, i64 %half, i64 %less
  %padded = add i64 %all, %rest
  %to = udiv i64 %padded, %total
  %to_high = shl i64 %to, 32
  %part = or i64 %to_high, %from
  %nothing = icmp eq i64 %weight, 0
  %other = icmp ne i64 %member, 0
  %out = and i1 %nothing, %other
  %share = select i1 %out, i64 $ABSENT, i64 %part
  %share_offset = mul i64 %member, $MEMBER
  %share_plus = add i64 %share_offset, $SHARE_AT
  %share_at = getelementptr i8, ptr %team, i64 %share_plus
  %four = mul i64 %weight, 4
  %three = mul i64 %greatest, 3
  %below = icmp ult i64 %four, %three
  %slow = and i1 %below, %other
  %divisor = call i64 @llvm.smax.i64(i64 %weight, i64 1)
  %others = sub i64 %total, %weight
  %others_padded = add i64 %others, %divisor
  %others_more = sub i64 %others_padded, 1
  %turns = udiv i64 %others_more, %divisor
  %least = select i1 %slow, i64 %turns, i64 0
  %least_plus = add i64 %share_offset, $LEAST_AT
  %least_at = getelementptr i8, ptr %team, i64 %least_plus
  store atomic i64 %least, ptr %least_at monotonic, align 8
  store atomic i64 %share, ptr %share_at release, align 8
  %dealt = icmp sge i64 %member_next, %size
  br i1 %dealt, label %done, label %deal
done:
  ret void
}
"""

PIN = """
; The calling thread goes to a member's CPUs. If it may not, it stays where it is, which costs time at worst.
define internal void @pin(ptr %member) {
  %cpus_at = getelementptr i8, ptr %member, i64 $CPUS
  %cpus = load ptr, ptr %cpus_at
  %anywhere = icmp eq ptr %cpus, null
  br i1 %anywhere, label %out, label %there
there:
  call i32 @sched_setaffinity(i32 0, i64 $CPU_BYTES, ptr %cpus)
  br label %out
out:
  ret void
}
"""


def table(chunks: int, weights: Sequence[int]) -> tuple[int, ...]:
    """The numbers of a table. Raises ValueError for weights that a region would wait for in vain."""
    if chunks < 1 or not weights or weights[0] < 1 or min(weights) < 0:
        raise ValueError(f"{chunks} chunks cannot be dealt by the weights {list(weights)}")
    return (len(weights), chunks, *weights)


def cpu_bits(cpus: Collection[int]) -> bytes:
    """A set of CPUs as the system takes it; those with larger numbers than it has bits are left out."""
    bits = sum(1 << cpu for cpu in set(cpus) if cpu < 8 * CPU_BYTES)
    return bits.to_bytes(CPU_BYTES, "little")
