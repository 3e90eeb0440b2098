// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// System-call anomalies of watched cgroups: a call that was never made while learning, or a window with too many errors.
// Only on request: attached, it makes every system call of the machine about 100 ns slower, and another 100 ns in a
// watched cgroup. x86-64 call numbers. Spec: docs/spec/kernel-abi.md section 10.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define CALLS 512
#define EINTR       4
#define EAGAIN      11
#define EINPROGRESS 115
#define MAX_ERRNO   4095

volatile const __u64 window_ns = 1000000000;
volatile const __u32 error_min = 50;
volatile const __u32 error_percent = 30;

struct habits { /* 184 bytes */
	__u64 since;
	__u64 calls;  /* in this window */
	__u64 errors;
	__u64 fired;  /* errors were reported in this window */
	__u64 total;  /* never reset */
	__u64 armed;  /* from this time on a new call is reported, CLOCK_MONOTONIC; 0: never */
	__u64 novel;  /* calls reported */
	__u64 seen[CALLS / 64];     /* while learning */
	__u64 reported[CALLS / 64]; /* novel ones */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct habits);
} watched SEC(".maps");

// EAGAIN, EINTR and EINPROGRESS are ordinary answers.
static __always_inline int failed(long result)
{
	return result < 0 && result >= -MAX_ERRNO && result != -EAGAIN && result != -EINTR && result != -EINPROGRESS;
}

static __always_inline void report(__u16 kind, __u64 now, __u64 cgroup, __u32 number, long result,
				   const struct habits *h)
{
	struct pointcall_event *e = pc_begin(kind, now);

	if (!e)
		return;
	e->pid = bpf_get_current_pid_tgid() >> 32;
	e->cgroup = cgroup;
	e->syscall.number = number;
	e->syscall.result = result;
	e->syscall.errors = h->errors;
	e->syscall.calls = h->calls;
	pc_send(e);
}

SEC("tp_btf/sys_exit")
int pc_sys_exit(__u64 *ctx)
{
	__u64 cgroup = bpf_get_current_cgroup_id(), now, bit, *word;
	struct habits *h = bpf_map_lookup_elem(&watched, &cgroup);
	long number, result = ctx[1];

	if (!h)
		return 0;
	number = BPF_CORE_READ((struct pt_regs *)ctx[0], orig_ax);
	if (number < 0 || number >= CALLS)
		return 0;
	now = bpf_ktime_get_ns();
	if (now - h->since > window_ns) { // racy by design: one may be counted in the window beside it
		h->since = now;
		h->calls = h->errors = h->fired = 0;
	}
	h->calls++;
	h->total++;
	bit = 1ULL << (number & 63);
	word = &h->seen[(number >> 6) & (CALLS / 64 - 1)];
	if (!(*word & bit)) {
		if (!h->armed || now < h->armed) {
			__sync_fetch_and_or(word, bit);
		} else {
			word = &h->reported[(number >> 6) & (CALLS / 64 - 1)];
			if (!(*word & bit) && !(__sync_fetch_and_or(word, bit) & bit)) {
				h->novel++;
				report(POINTCALL_SYSCALL_NOVEL, now, cgroup, number, result, h);
			}
		}
	}
	if (!failed(result))
		return 0;
	h->errors++;
	if (h->errors >= error_min && h->errors * 100 >= h->calls * error_percent && !h->fired) {
		h->fired = 1;
		report(POINTCALL_SYSCALL_ERRORS, now, cgroup, number, result, h);
	}
	return 0;
}
