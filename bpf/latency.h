/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Latency by (cgroup, device, operation): a log2 histogram and one verdict per window. Included once by an object.
 * A window is judged when its last slow operation ends: enough slow ones and a large enough share, or one very long.
 * What does not end is in the map `in_flight`: user space looks there, and asks `pc_still` about what is old.
 *
 * An object defines its programs at the end before those at the begin: they are attached in this order, so that every
 * begin that is seen has an end that is seen.
 */
#ifndef POINTCALL_LATENCY_H
#define POINTCALL_LATENCY_H

#include "operation.h"

#ifndef PC_SOURCE
#define PC_SOURCE POINTCALL_SOURCE_STORAGE
#endif

volatile const __u64 slow_ns = 20000000;
volatile const __u64 stall_ns = 250000000; /* one operation this long is enough */
volatile const __u64 window_ns = 1000000000;
volatile const __u32 slow_min = 5;
volatile const __u32 slow_percent = 20;
volatile const __u32 error_min = 1;

/* Bounded: of too many the one that was used longest ago makes room. Cgroups come and go, and a request whose end no
 * tracepoint told would stay for good: the newest slow operation must be seen all the same. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 10240);
	__type(key, __u64);
	__type(value, struct pc_started);
} in_flight SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct pc_latency_key);
	__type(value, struct pc_latency);
} latencies SEC(".maps");

static __always_inline int pc_latency_begin(__u64 id, __u64 cgroup, __u32 device, __u32 operation)
{
	struct pc_started started = {bpf_ktime_get_ns(), {cgroup, device, operation}};

	bpf_map_update_elem(&in_flight, &id, &started, BPF_ANY);
	return 0;
}

/* What the kernel's own memory says. Each object has its own. */
static enum pc_answer pc_goes_on(__u64 id, const struct pc_started *started);

/* An end that no tracepoint told would leave its entry for good: here it goes. */
SEC("syscall")
int pc_still(struct pc_question *ctx)
{
	struct pc_question asked = *ctx;
	struct pc_started *started = bpf_map_lookup_elem(&in_flight, &asked.id);
	enum pc_answer answer;

	if (!started || started->at_ns != asked.at_ns)
		return PC_ENDED;
	answer = pc_goes_on(asked.id, started);
	if (answer == PC_ENDED)
		bpf_map_delete_elem(&in_flight, &asked.id);
	return answer;
}

static __always_inline __u32 pc_log2(__u64 v)
{
	__u32 r = 0;

	if (v >> 32) { r += 32; v >>= 32; }
	if (v >> 16) { r += 16; v >>= 16; }
	if (v >> 8) { r += 8; v >>= 8; }
	if (v >> 4) { r += 4; v >>= 4; }
	if (v >> 2) { r += 2; v >>= 2; }
	return r + (v >> 1 ? 1 : 0);
}

static __always_inline void pc_storage_event(__u16 kind, const struct pc_latency_key *key, const struct pc_latency *l,
					     __u64 now)
{
	struct pointcall_event *e = pc_begin(kind, now);

	if (!e)
		return;
	e->cgroup = key->cgroup;
	e->storage.device = key->device;
	e->storage.operation = key->operation;
	e->storage.operations = l->count;
	e->storage.slow = l->slow;
	e->storage.longest_ns = l->longest;
	e->storage.errors = l->errors;
	e->storage.source = PC_SOURCE;
	pc_send(e);
}

static __always_inline void pc_judge(const struct pc_latency_key *key, struct pc_latency *l, __u64 took, int failed,
				     __u64 now)
{
	if (failed && l->errors >= error_min && !(__sync_fetch_and_or(&l->fired, 2) & 2))
		pc_storage_event(POINTCALL_DISK_ERROR, key, l, now);
	if (took < slow_ns)
		return;
	if (took < stall_ns && (l->slow < slow_min || l->slow * 100 < l->count * slow_percent))
		return;
	if (!(__sync_fetch_and_or(&l->fired, 1) & 1))
		pc_storage_event(POINTCALL_STORAGE_SLOW, key, l, now);
}

/* Counters are racy by design at the edge of a window: an operation may be counted in the one beside it. */
static __always_inline int pc_latency_end(__u64 id, int failed)
{
	static const struct pc_latency zero;
	struct pc_started *started = bpf_map_lookup_elem(&in_flight, &id);
	__u64 now = bpf_ktime_get_ns(), took;
	struct pc_latency_key key;
	struct pc_latency *l;
	__u32 bucket;

	if (!started)
		return 0;
	took = now - started->at_ns;
	key = started->key;
	bpf_map_delete_elem(&in_flight, &id);
	l = bpf_map_lookup_elem(&latencies, &key);
	if (!l) {
		bpf_map_update_elem(&latencies, &key, (void *)&zero, BPF_NOEXIST);
		l = bpf_map_lookup_elem(&latencies, &key);
		if (!l)
			return 0;
	}
	if (now - l->since > window_ns) {
		l->since = now;
		l->count = l->slow = l->longest = l->errors = l->fired = 0;
	}
	bucket = pc_log2(took >> 10);
	__sync_fetch_and_add(&l->bucket[bucket < PC_BUCKETS ? bucket : PC_BUCKETS - 1], 1);
	__sync_fetch_and_add(&l->total, 1);
	__sync_fetch_and_add(&l->count, 1);
	if (took > l->longest)
		l->longest = took;
	if (took >= slow_ns)
		__sync_fetch_and_add(&l->slow, 1);
	if (failed)
		__sync_fetch_and_add(&l->errors, 1);
	pc_judge(&key, l, took, failed, now);
	return 0;
}

#endif
