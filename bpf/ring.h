/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The ring of one object and its exact loss count: every record is either in the ring or in `lost`.
 * Included once by each object.
 */
#ifndef POINTCALL_RING_H
#define POINTCALL_RING_H

#ifndef PC_RING_BYTES
#define PC_RING_BYTES (1 << 18) /* 4,096 records: 40 ms of the worst storm seen, at 10 us a record */
#endif

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, PC_RING_BYTES);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pointcall_counters);
} counters SEC(".maps");

static __always_inline struct pointcall_counters *pc_counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

/* A zeroed record, or 0 where the ring is full. Every record that is begun must be sent. It is tested for 0 only once:
 * the 6.1 verifier does not remember the first answer, and follows a path on which the record is lost. */
static __always_inline struct pointcall_event *pc_begin(__u16 kind, __u64 at_ns)
{
	struct pointcall_event *e = bpf_ringbuf_reserve(&events, sizeof *e, 0);
	struct pointcall_counters *n;

	if (!e) {
		n = pc_counters();
		if (n)
			__sync_fetch_and_add(&n->lost, 1);
		return 0;
	}
	n = pc_counters();
	if (n)
		__sync_fetch_and_add(&n->events, 1);
	__builtin_memset(e, 0, sizeof *e);
	e->at_ns = at_ns;
	e->kind = kind;
	return e;
}

static __always_inline void pc_send(struct pointcall_event *e)
{
	bpf_ringbuf_submit(e, 0);
}

#endif
