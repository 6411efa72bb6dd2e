"""The code of the thread team: a parallel loop over pthreads for native code, with nothing of Python in it.

Generated code calls `stitch_parallel(team, fn, args, tasks, grain)`, which runs `fn(args, begin, end, worker)` for
ranges that cover 0 … tasks exactly once each, and returns when all of them are done. `worker` is 0 for the caller,
1 … size-1 for the others: no two ranges with the same number run at the same time, so it can index scratch memory.

One 64-bit word says how far the region in progress is: its epoch in the upper half, and how many chunks nobody has
claimed yet in the lower. A chunk is claimed by compare-exchange of the whole word; which one it is, is seen then: each
member of the team has a share of the chunks, takes those from the front, and, when it has none left, those at the back
of others' shares.

    caller                                     worker
    write fn, args, tasks, chunks, shares      read word: nothing left? spin, later park
    word <- (epoch + 1, chunks)                word (e, n) -> (e, n - 1), or start again
    claim and run chunks until none is left    take a chunk of a share, read fn, args, ...
    wait until done + own == chunks            run the chunk; when none is left: done += how many

* A claim holds the region in place: it cannot end before the chunk is done. So whoever has one finds the description
  and the shares of this very region; and a chunk, for there are as many in the shares as there are claims.
* The shares are the same parts of each region's tasks, one after the other. So what a processor reads is, more often
  than not, what it wrote itself in the region before, and still in its own caches. That is worth most where two
  processors have no cache in common: a line then takes 160 ns from one to the other, rather than 25.
* Chunks differ by one task at most, and there are as many for each member, if there are enough for all.
* Members may be on unlike processors: `stitch_share` takes a table of weights (how many members, how many chunks at
  most, a weight for each member), and deals the chunks in their proportion. A member of no weight takes no part in the
  region, and a slow one leaves the last chunks to others: it would delay them. Member 0, the caller, may take any.
* The caller waits only for chunks that were claimed, so that a worker which the system does not let run, beside a
  busy neighbour or throttled by a quota, delays nothing unless it is stopped inside a chunk. There are several
  chunks per worker to keep that short. A caller that waits sleeps after a while: to spin, or to yield again and
  again, would use up the share of the processor that it needs when the chunk is done.
* A team serves one region at a time. Whoever finds it taken, from another thread or from inside a region, does the
  work alone, at once.
* Workers are started by the first region. Inside an inference (`stitch_team_begin` … `stitch_team_end`) they spin
  for a while between regions; then, and soon after it, they sleep on a condition variable. The caller wakes two,
  and each who wakes two more, so that nobody pays for a long row of system calls. It wakes nobody for a region that
  is too small for that: a system call takes longer than a few chunks.
* After fork the child has the memory of the team but none of its threads: `Team` sets it back to its first state.

The team is written here as LLVM IR, so that installing needs no C compiler. It uses pthreads and nothing
else of the system.
"""

from __future__ import annotations

from stitch.runtime import shares

# Byte offsets in a team. What is written often has a cache line of its own.
WORD = 0
FN, ARGS, TASKS, CHUNKS = 64, 72, 80, 88
DONE, WAITING = 128, 136
BUSY = 192
ACTIVE = 256
SLEEPERS, LIVE, STARTED = 320, 328, 336
SIZE, STOP = 384, 392
MUTEX, CONDITION = 448, 576
END_MUTEX, END_CONDITION = 704, 832
MEMBERS, MEMBER = 960, 64  # so many bytes for each member: team, number, then what `stitch.runtime.shares` says
ALIGNMENT = 64

CHUNKS_PER_WORKER = 4
WAKING = 3  # grains that a region must exceed if all workers are asleep: to wake one costs more than to hand out work
SPIN_INSIDE_NS = 100_000  # how long a worker looks for the next region of an inference before it sleeps
SPIN_OUTSIDE_NS = 10_000  # the same when no inference is going on
SPIN_CALLER_NS = 50_000  # how long a caller looks for the end of the last chunks before it sleeps

FUNCTIONS = ("stitch_parallel", "stitch_share", "stitch_team_size", "stitch_team_begin", "stitch_team_end",
             "stitch_team_init", "stitch_team_stop")  # fmt: skip

# $NAME is an offset or a constant from above, or differs between machines: see `ir`.
_IR = """
declare i32 @pthread_create(ptr, ptr, ptr, ptr)
declare i32 @pthread_detach(i64)
declare i32 @pthread_mutex_init(ptr, ptr)
declare i32 @pthread_mutex_lock(ptr)
declare i32 @pthread_mutex_trylock(ptr)
declare i32 @pthread_mutex_unlock(ptr)
declare i32 @pthread_cond_init(ptr, ptr)
declare i32 @pthread_cond_wait(ptr, ptr)
declare i32 @pthread_cond_signal(ptr)
declare i32 @pthread_cond_broadcast(ptr)
declare i32 @pthread_sigmask(i32, ptr, ptr)
declare i32 @sigfillset(ptr)
declare i32 @sigdelset(ptr, i32)
declare i32 @clock_gettime(i32, ptr)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
$PAUSE_DECLARE
$PIN_DECLARE

; Nanoseconds on a clock that only goes forward.
define internal i64 @now() nounwind {
  %spec = alloca [2 x i64], align 8
  call i32 @clock_gettime(i32 $CLOCK, ptr %spec)
  %seconds = load i64, ptr %spec
  %rest_at = getelementptr i8, ptr %spec, i64 8
  %rest = load i64, ptr %rest_at
  %scaled = mul i64 %seconds, 1000000000
  %sum = add i64 %scaled, %rest
  ret i64 %sum
}

; Some tens of pauses, cut short when `at` is not `from` any more: about a microsecond.
define internal void @rest(ptr %at, i64 %from) nounwind {
entry:
  br label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %again]
  $PAUSE
  %value = load atomic i64, ptr %at acquire, align 8
  %same = icmp eq i64 %value, %from
  br i1 %same, label %again, label %out
again:
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, 32
  br i1 %more, label %loop, label %out
out:
  ret void
}

; Wake two sleepers. If a worker holds the mutex it is on its way; one that goes to sleep at this very moment
; misses a region, which costs time at worst. So nobody waits here for a worker that is not running.
define internal void @wake(ptr %team) nounwind {
  %mutex = getelementptr i8, ptr %team, i64 $MUTEX
  %condition = getelementptr i8, ptr %team, i64 $CONDITION
  %error = call i32 @pthread_mutex_trylock(ptr %mutex)
  %locked = icmp eq i32 %error, 0
  br i1 %locked, label %signal, label %out
signal:
  call i32 @pthread_mutex_unlock(ptr %mutex)
  call i32 @pthread_cond_signal(ptr %condition)
  call i32 @pthread_cond_signal(ptr %condition)
  br label %out
out:
  ret void
}

; A chunk for one who has a claim: the next one of its own share, or the last one of another's. No share ever grows
; while there are claims, so it has found one when it has seen all of them.
define internal i64 @pick(ptr %team, i64 %worker) {
entry:
  %size_at = getelementptr i8, ptr %team, i64 $SIZE
  %size = load i64, ptr %size_at
  %table = getelementptr i8, ptr %team, i64 $MEMBERS
  br label %look
look:
  %whose = phi i64 [%worker, %entry], [%next, %other]
  %offset = mul i64 %whose, $MEMBER
  %member = getelementptr i8, ptr %table, i64 %offset
  %share_at = getelementptr i8, ptr %member, i64 $SHARE
  %first = load atomic i64, ptr %share_at acquire, align 8
  br label %try
try:
  %share = phi i64 [%first, %look], [%found, %claim]
  %begin = and i64 %share, 4294967295
  %end = lshr i64 %share, 32
  %some = icmp ult i64 %begin, %end
  br i1 %some, label %claim, label %other
other:
  %following = add i64 %whose, 1
  %wraps = icmp sge i64 %following, %size
  %next = select i1 %wraps, i64 0, i64 %following
  br label %look
claim:
  %own = icmp eq i64 %whose, %worker
  %last = sub i64 %end, 1
  %change = select i1 %own, i64 1, i64 -4294967296
  %rest = add i64 %share, %change
  %swap = cmpxchg ptr %share_at, i64 %share, i64 %rest acq_rel acquire
  %found = extractvalue {i64, i1} %swap, 0
  %mine = extractvalue {i64, i1} %swap, 1
  br i1 %mine, label %out, label %try
out:
  %index = select i1 %own, i64 %begin, i64 %last
  ret i64 %index
}

; Claim chunks of the region in progress and run them until none is left. How many it were.
define internal i64 @work(ptr %team, i64 %worker) {
entry:
  %fn_at = getelementptr i8, ptr %team, i64 $FN
  %args_at = getelementptr i8, ptr %team, i64 $ARGS
  %tasks_at = getelementptr i8, ptr %team, i64 $TASKS
  %chunks_at = getelementptr i8, ptr %team, i64 $CHUNKS
  br label %look
look:
  %count = phi i64 [0, %entry], [%count, %claim], [%more, %run]
  %word = load atomic i64, ptr %team acquire, align 8
  %left = call i64 @claimable(ptr %team, i64 %worker, i64 %word)
  %none = icmp eq i64 %left, 0
  br i1 %none, label %out, label %claim
claim:
  %less = sub i64 %word, 1
  %swap = cmpxchg ptr %team, i64 %word, i64 %less acq_rel acquire
  %mine = extractvalue {i64, i1} %swap, 1
  br i1 %mine, label %run, label %look
run:
  %index = call i64 @pick(ptr %team, i64 %worker)
  %fn_bits = load atomic i64, ptr %fn_at acquire, align 8
  %args_bits = load atomic i64, ptr %args_at acquire, align 8
  %tasks = load atomic i64, ptr %tasks_at acquire, align 8
  %chunks = load atomic i64, ptr %chunks_at acquire, align 8
  %fn = inttoptr i64 %fn_bits to ptr
  %args = inttoptr i64 %args_bits to ptr
  %following = add i64 %index, 1
  %before = mul i64 %index, %tasks
  %after = mul i64 %following, %tasks
  %begin = udiv i64 %before, %chunks
  %end = udiv i64 %after, %chunks
  call void %fn(ptr %args, i64 %begin, i64 %end, i64 %worker)
  %more = add i64 %count, 1
  br label %look
out:
  ret i64 %count
}

; A worker's whole life. `member` is its place in the team's table.
define internal ptr @live(ptr %member) {
entry:
  %team = load ptr, ptr %member
  %worker_at = getelementptr i8, ptr %member, i64 8
  %worker = load i64, ptr %worker_at
  %done_at = getelementptr i8, ptr %team, i64 $DONE
  %waiting_at = getelementptr i8, ptr %team, i64 $WAITING
  %end_mutex = getelementptr i8, ptr %team, i64 $END_MUTEX
  %end_condition = getelementptr i8, ptr %team, i64 $END_CONDITION
  %stop_at = getelementptr i8, ptr %team, i64 $STOP
  %active_at = getelementptr i8, ptr %team, i64 $ACTIVE
  %sleepers_at = getelementptr i8, ptr %team, i64 $SLEEPERS
  %live_at = getelementptr i8, ptr %team, i64 $LIVE
  %mutex = getelementptr i8, ptr %team, i64 $MUTEX
  %condition = getelementptr i8, ptr %team, i64 $CONDITION
  $PIN
  br label %busy
busy:
  %count = call i64 @work(ptr %team, i64 %worker)
  %idle = icmp eq i64 %count, 0
  br i1 %idle, label %since, label %report
report:
  %before = atomicrmw add ptr %done_at, i64 %count seq_cst
  %waiting = load atomic i64, ptr %waiting_at seq_cst, align 8
  %awaited = icmp ne i64 %waiting, 0
  br i1 %awaited, label %tell, label %since
tell:
  call i32 @pthread_mutex_lock(ptr %end_mutex)
  call i32 @pthread_mutex_unlock(ptr %end_mutex)
  call i32 @pthread_cond_signal(ptr %end_condition)
  br label %since
since:
  %start = call i64 @now()
  br label %spin
spin:
  %stop = load atomic i64, ptr %stop_at acquire, align 8
  %stopped = icmp ne i64 %stop, 0
  br i1 %stopped, label %leave, label %peek
peek:
  %word = load atomic i64, ptr %team acquire, align 8
  %left = call i64 @claimable(ptr %team, i64 %worker, i64 %word)
  %some = icmp ne i64 %left, 0
  br i1 %some, label %busy, label %wait
wait:
  call void @rest(ptr %team, i64 %word)
  %time = call i64 @now()
  %spent = sub i64 %time, %start
  %active = load atomic i64, ptr %active_at monotonic, align 8
  %inside = icmp sgt i64 %active, 0
  %limit = select i1 %inside, i64 $SPIN_INSIDE_NS, i64 $SPIN_OUTSIDE_NS
  %on = icmp slt i64 %spent, %limit
  br i1 %on, label %spin, label %park
park:
  call i32 @pthread_mutex_lock(ptr %mutex)
  %s0 = atomicrmw add ptr %sleepers_at, i64 1 seq_cst
  %word2 = load atomic i64, ptr %team seq_cst, align 8
  %left2 = call i64 @claimable(ptr %team, i64 %worker, i64 %word2)
  %stop2 = load atomic i64, ptr %stop_at seq_cst, align 8
  %either = or i64 %left2, %stop2
  %sleep = icmp eq i64 %either, 0
  br i1 %sleep, label %asleep, label %awake
asleep:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %awake
awake:
  %s1 = atomicrmw sub ptr %sleepers_at, i64 1 seq_cst
  call i32 @pthread_mutex_unlock(ptr %mutex)
  %word3 = load atomic i64, ptr %team acquire, align 8
  %left3 = and i64 %word3, 4294967295
  %plenty = icmp ugt i64 %left3, 1
  %others = icmp sgt i64 %s1, 1
  %pass = and i1 %plenty, %others
  br i1 %pass, label %chain, label %busy
chain:
  call void @wake(ptr %team)
  br label %busy
leave:
  %l = atomicrmw sub ptr %live_at, i64 1 acq_rel
  ret ptr null
}

; Start the workers, once. Python handles signals in its main thread: workers block them, except for faults.
define internal void @start(ptr %team) cold noinline {
entry:
  %set = alloca [128 x i8], align 8
  %old = alloca [128 x i8], align 8
  %thread = alloca i64, align 8
  %started_at = getelementptr i8, ptr %team, i64 $STARTED
  store atomic i64 1, ptr %started_at release, align 8
  %size_at = getelementptr i8, ptr %team, i64 $SIZE
  %size = load i64, ptr %size_at
  %live_at = getelementptr i8, ptr %team, i64 $LIVE
  call i32 @sigfillset(ptr %set)
  call i32 @sigdelset(ptr %set, i32 4)
  call i32 @sigdelset(ptr %set, i32 8)
  call i32 @sigdelset(ptr %set, i32 11)
  call i32 @sigdelset(ptr %set, i32 $SIGBUS)
  call i32 @pthread_sigmask(i32 $SIG_SETMASK, ptr %set, ptr %old)
  br label %loop
loop:
  %worker = phi i64 [1, %entry], [%next, %created]
  %on = icmp slt i64 %worker, %size
  br i1 %on, label %create, label %out
create:
  %offset = mul i64 %worker, $MEMBER
  %table = getelementptr i8, ptr %team, i64 $MEMBERS
  %member = getelementptr i8, ptr %table, i64 %offset
  store ptr %team, ptr %member
  %worker_at = getelementptr i8, ptr %member, i64 8
  store i64 %worker, ptr %worker_at
  %l = atomicrmw add ptr %live_at, i64 1 acq_rel
  %error = call i32 @pthread_create(ptr %thread, ptr null, ptr @live, ptr %member)
  %failed = icmp ne i32 %error, 0
  br i1 %failed, label %fewer, label %created
created:
  %id = load i64, ptr %thread
  call i32 @pthread_detach(i64 %id)
  %next = add i64 %worker, 1
  br label %loop
fewer:
  %m = atomicrmw sub ptr %live_at, i64 1 acq_rel
  br label %out
out:
  call i32 @pthread_sigmask(i32 $SIG_SETMASK, ptr %old, ptr null)
  ret void
}

; Wait until workers have finished `expected` chunks. Workers look at `waiting` after they have added to `done`, the
; caller at `done` after it has set `waiting`, so that one of them sees the other.
define internal void @join(ptr %team, i64 %expected) {
entry:
  %done_at = getelementptr i8, ptr %team, i64 $DONE
  %first = load atomic i64, ptr %done_at acquire, align 8
  %ready = icmp eq i64 %first, %expected
  br i1 %ready, label %out, label %begin
begin:
  %start = call i64 @now()
  br label %loop
loop:
  %done = load atomic i64, ptr %done_at acquire, align 8
  %finished = icmp eq i64 %done, %expected
  br i1 %finished, label %out, label %wait
wait:
  call void @rest(ptr %done_at, i64 %done)
  %time = call i64 @now()
  %spent = sub i64 %time, %start
  %long = icmp sgt i64 %spent, $SPIN_CALLER_NS
  br i1 %long, label %park, label %loop
park:
  %waiting_at = getelementptr i8, ptr %team, i64 $WAITING
  %mutex = getelementptr i8, ptr %team, i64 $END_MUTEX
  %condition = getelementptr i8, ptr %team, i64 $END_CONDITION
  call i32 @pthread_mutex_lock(ptr %mutex)
  store atomic i64 1, ptr %waiting_at seq_cst, align 8
  br label %check
check:
  %done2 = load atomic i64, ptr %done_at seq_cst, align 8
  %there = icmp eq i64 %done2, %expected
  br i1 %there, label %unpark, label %sleep
sleep:
  call i32 @pthread_cond_wait(ptr %condition, ptr %mutex)
  br label %check
unpark:
  store atomic i64 0, ptr %waiting_at seq_cst, align 8
  call i32 @pthread_mutex_unlock(ptr %mutex)
  br label %out
out:
  ret void
}

define void @stitch_parallel(ptr %team, ptr %fn, ptr %args, i64 %tasks, i64 %given) {
  call void @stitch_share(ptr %team, ptr %fn, ptr %args, i64 %tasks, i64 %given, ptr null)
  ret void
}

; `table`: i32s, how many members there are, how many chunks there are to be at most, and a weight for each member.
; Null, or for a team of another size: all members alike.
define void @stitch_share(ptr %team, ptr %fn, ptr %args, i64 %tasks, i64 %given, ptr %table) {
entry:
  %grain = call i64 @llvm.smax.i64(i64 %given, i64 1)
  %nobody = icmp eq ptr %team, null
  %little = icmp sle i64 %tasks, %grain
  %direct = or i1 %nobody, %little
  br i1 %direct, label %alone, label %ask
ask:
  %size_at = getelementptr i8, ptr %team, i64 $SIZE
  %size = load i64, ptr %size_at
  %single = icmp sle i64 %size, 1
  br i1 %single, label %alone, label %near
near:
  %asleep_at = getelementptr i8, ptr %team, i64 $SLEEPERS
  %resting = load atomic i64, ptr %asleep_at monotonic, align 8
  %awake = sub i64 %size, %resting
  %someone = icmp sgt i64 %awake, 1
  %worth = mul i64 %grain, $WAKING
  %enough = icmp sgt i64 %tasks, %worth
  %go = or i1 %someone, %enough
  br i1 %go, label %try, label %alone
try:
  %busy_at = getelementptr i8, ptr %team, i64 $BUSY
  %lock = cmpxchg ptr %busy_at, i64 0, i64 1 acquire monotonic
  %got = extractvalue {i64, i1} %lock, 1
  br i1 %got, label %taken, label %alone
taken:
  %started_at = getelementptr i8, ptr %team, i64 $STARTED
  %started = load atomic i64, ptr %started_at acquire, align 8
  %is_started = icmp ne i64 %started, 0
  br i1 %is_started, label %publish, label %launch
launch:
  call void @start(ptr %team)
  br label %publish
publish:
  %most_alike = mul i64 %size, $CHUNKS_PER_WORKER
  %alike = icmp eq ptr %table, null
  br i1 %alike, label %count, label %meant
meant:
  %meant_size = load i32, ptr %table
  %meant_wide = zext i32 %meant_size to i64
  %fits = icmp eq i64 %meant_wide, %size
  br i1 %fits, label %given_count, label %count
given_count:
  %most_at = getelementptr i8, ptr %table, i64 4
  %most_given = load i32, ptr %most_at
  %most_wide = zext i32 %most_given to i64
  br label %count
count:
  %weighted = phi i1 [0, %publish], [0, %meant], [1, %given_count]
  %most = phi i64 [%most_alike, %publish], [%most_alike, %meant], [%most_wide, %given_count]
  %grain_less = sub i64 %grain, 1
  %padded = add i64 %tasks, %grain_less
  %worth_it = sdiv i64 %padded, %grain
  %wanted = call i64 @llvm.smin.i64(i64 %worth_it, i64 %most)
  %odd = srem i64 %wanted, %size
  %even = sub i64 %wanted, %odd
  %few = icmp slt i64 %wanted, %size
  %as_many = or i1 %few, %weighted
  %chunks = select i1 %as_many, i64 %wanted, i64 %even
  %fn_at = getelementptr i8, ptr %team, i64 $FN
  %args_at = getelementptr i8, ptr %team, i64 $ARGS
  %tasks_at = getelementptr i8, ptr %team, i64 $TASKS
  %chunks_at = getelementptr i8, ptr %team, i64 $CHUNKS
  %done_at = getelementptr i8, ptr %team, i64 $DONE
  %fn_bits = ptrtoint ptr %fn to i64
  %args_bits = ptrtoint ptr %args to i64
  store atomic i64 %fn_bits, ptr %fn_at release, align 8
  store atomic i64 %args_bits, ptr %args_at release, align 8
  store atomic i64 %tasks, ptr %tasks_at release, align 8
  store atomic i64 %chunks, ptr %chunks_at release, align 8
  store atomic i64 0, ptr %done_at release, align 8
  call void @deal(ptr %team, i64 %size, i64 %chunks, ptr %table, i1 %weighted)
  br label %open
open:
  %word = load atomic i64, ptr %team monotonic, align 8
  %epoch = and i64 %word, -4294967296
  %next = add i64 %epoch, 4294967296
  %new = or i64 %next, %chunks
  %was = atomicrmw xchg ptr %team, i64 %new seq_cst
  %sleepers_at = getelementptr i8, ptr %team, i64 $SLEEPERS
  %sleepers = load atomic i64, ptr %sleepers_at seq_cst, align 8
  %asleep = icmp sgt i64 %sleepers, 0
  br i1 %asleep, label %rouse, label %share
rouse:
  call void @wake(ptr %team)
  br label %share
share:
  %own = call i64 @work(ptr %team, i64 0)
  %theirs = sub i64 %chunks, %own
  call void @join(ptr %team, i64 %theirs)
  store atomic i64 0, ptr %busy_at release, align 8
  ret void
alone:
  call void %fn(ptr %args, i64 0, i64 %tasks, i64 0)
  ret void
}

define i64 @stitch_team_size(ptr %team) {
  %nobody = icmp eq ptr %team, null
  br i1 %nobody, label %one, label %some
some:
  %size_at = getelementptr i8, ptr %team, i64 $SIZE
  %size = load i64, ptr %size_at
  ret i64 %size
one:
  ret i64 1
}

define void @stitch_team_begin(ptr %team) {
  %nobody = icmp eq ptr %team, null
  br i1 %nobody, label %out, label %some
some:
  %active_at = getelementptr i8, ptr %team, i64 $ACTIVE
  %was = atomicrmw add ptr %active_at, i64 1 monotonic
  br label %out
out:
  ret void
}

define void @stitch_team_end(ptr %team) {
  %nobody = icmp eq ptr %team, null
  br i1 %nobody, label %out, label %some
some:
  %active_at = getelementptr i8, ptr %team, i64 $ACTIVE
  %was = atomicrmw sub ptr %active_at, i64 1 monotonic
  br label %out
out:
  ret void
}

; Make a team of zeroed memory, or make one anew in a child after fork.
define void @stitch_team_init(ptr %team, i64 %size) {
  call void @llvm.memset.p0.i64(ptr %team, i8 0, i64 $MEMBERS, i1 false)
  %size_at = getelementptr i8, ptr %team, i64 $SIZE
  store i64 %size, ptr %size_at
  %mutex = getelementptr i8, ptr %team, i64 $MUTEX
  %condition = getelementptr i8, ptr %team, i64 $CONDITION
  call i32 @pthread_mutex_init(ptr %mutex, ptr null)
  %end_mutex = getelementptr i8, ptr %team, i64 $END_MUTEX
  %end_condition = getelementptr i8, ptr %team, i64 $END_CONDITION
  call i32 @pthread_cond_init(ptr %condition, ptr null)
  call i32 @pthread_mutex_init(ptr %end_mutex, ptr null)
  call i32 @pthread_cond_init(ptr %end_condition, ptr null)
  ret void
}

; Ask the workers to leave, after which regions run on their callers alone. How many are still there.
define i64 @stitch_team_stop(ptr %team) {
  %started_at = getelementptr i8, ptr %team, i64 $STARTED
  store atomic i64 1, ptr %started_at release, align 8
  %stop_at = getelementptr i8, ptr %team, i64 $STOP
  store atomic i64 1, ptr %stop_at seq_cst, align 8
  %mutex = getelementptr i8, ptr %team, i64 $MUTEX
  %condition = getelementptr i8, ptr %team, i64 $CONDITION
  call i32 @pthread_mutex_lock(ptr %mutex)
  call i32 @pthread_mutex_unlock(ptr %mutex)
  call i32 @pthread_cond_broadcast(ptr %condition)
  %live_at = getelementptr i8, ptr %team, i64 $LIVE
  %live = load atomic i64, ptr %live_at acquire, align 8
  ret i64 %live
}

declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
"""

_PAUSES = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse2.pause()"),
    "aarch64": ("declare void @llvm.aarch64.isb(i32)", "call void @llvm.aarch64.isb(i32 15)"),
}
_PAUSES["arm64"] = _PAUSES["aarch64"]


def ir(triple: str) -> str:
    """The team's code for a machine, which must be a 64-bit one."""
    declare, pause = _PAUSES.get(triple.split("-")[0], ("", ""))
    apple = "darwin" in triple or "macos" in triple
    linux = "linux" in triple
    constants: dict[str, object] = {
        "PAUSE_DECLARE": declare,
        "PAUSE": pause,
        "PIN_DECLARE": "declare i32 @sched_setaffinity(i32, i64, ptr)" if linux else "",
        "PIN": "call void @pin(ptr %member)" if linux else "",
        **{name: value for name, value in vars(shares).items() if name.isupper() and isinstance(value, int)},
        "SHARE_AT": MEMBERS + shares.SHARE,
        "LEAST_AT": MEMBERS + shares.LEAST,
        "CLOCK": 6 if apple else 1,
        "SIGBUS": 10 if apple else 7,
        "SIG_SETMASK": 3 if apple else 2,
        **{name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)},
    }
    text = f'target triple = "{triple}"\n{_IR}{shares.IR}{shares.PIN if linux else ""}'
    for name in sorted(constants, key=len, reverse=True):
        text = text.replace(f"${name}", str(constants[name]))
    return text
