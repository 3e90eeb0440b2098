// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// For benchmarks only, never in a manifest: when a reset came in (by destination port), and a filler of the ring.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "event.h"
#include "circuit.h"

#define PC_RING_BYTES (1 << 24)
#include "ring.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define FILL 200000

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536);
	__type(key, __u32);
	__type(value, __u64);
} reset_ns SEC(".maps");

SEC("tp_btf/tcp_receive_reset")
int pc_reset(__u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	__u32 port;
	__u64 now = bpf_ktime_get_ns();

	if (!sk)
		return 0;
	port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	bpf_map_update_elem(&reset_ns, &port, &now, BPF_ANY);
	return 0;
}

static long fill_one(__u64 i, void *unused)
{
	struct pointcall_event *e = pc_begin(POINTCALL_PROCESS_EXIT, i);

	if (!e)
		return 0; // counted as lost
	e->pid = i;
	bpf_ringbuf_submit(e, 1); // no wake-up
	return 0;
}

// Returns how many records it made, sent or lost.
SEC("syscall")
int pc_fill(void *ctx)
{
	return bpf_loop(FILL, fill_one, 0, 0);
}

SEC("syscall")
int pc_tick(void *ctx)
{
	struct pointcall_event *e = pc_begin(POINTCALL_PROCESS_EXIT, bpf_ktime_get_ns());

	if (e)
		pc_send(e);
	return 0;
}
