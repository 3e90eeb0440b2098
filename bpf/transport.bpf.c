// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Trouble on the way to watched destinations: resets of established connections, segments sent again, SYNs sent again.
// One event per window and kind. It reports; nothing here refuses a connect. Spec: docs/spec/kernel-abi.md section 9.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define AF_INET     2
#define AF_INET6    10
#define IPPROTO_TCP 6

volatile const __u64 window_ns = 1000000000;
volatile const __u32 resets_min = 5;
volatile const __u32 retransmits_min = 20;
volatile const __u32 timeouts_min = 3;

enum { RESETS, RETRANSMITS, TIMEOUTS, ATTEMPTS, KINDS };

struct trouble { /* 56 bytes */
	__u64 since;
	__u64 count[KINDS]; /* in this window */
	__u64 fired;        /* bit per kind */
	__u64 pad;
};

/* Only user space inserts: a destination that is not here is not watched, and none is evicted. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct pointcall_destination);
	__type(value, struct trouble);
} destinations SEC(".maps");

static __always_inline int peer_of(const struct sock *sk, struct pointcall_destination *d)
{
	__u32 *a = (__u32 *)d->address;
	__u16 family = BPF_CORE_READ(sk, __sk_common.skc_family);

	if (family == AF_INET) {
		a[2] = bpf_htonl(0xffff);
		a[3] = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	} else if (family == AF_INET6) {
		BPF_CORE_READ_INTO(d->address, sk, __sk_common.skc_v6_daddr);
	} else {
		return 0;
	}
	d->port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	d->protocol = IPPROTO_TCP;
	d->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, net_cookie);
	return 1;
}

static __always_inline void report(__u16 kind, const struct pointcall_destination *d, const struct trouble *t,
				   __u64 count, __u64 now)
{
	struct pointcall_event *e = pc_begin(kind, now);

	if (!e)
		return;
	__builtin_memcpy(e->transport.address, d->address, 16);
	e->transport.netns = d->netns;
	e->transport.port = d->port;
	e->transport.protocol = d->protocol;
	e->transport.count = count > 0xffff ? 0xffff : count;
	e->transport.attempts = t->count[ATTEMPTS] > 0xffff ? 0xffff : t->count[ATTEMPTS];
	pc_send(e);
}

static __always_inline int note(const struct sock *sk, __u32 what, __u16 kind, __u32 least)
{
	struct pointcall_destination d = {};
	struct trouble *t;
	__u64 now, count;

	if (!sk || !peer_of(sk, &d))
		return 0;
	t = bpf_map_lookup_elem(&destinations, &d);
	if (!t)
		return 0;
	now = bpf_ktime_get_ns();
	if (now - t->since > window_ns) { // racy by design: one may be counted in the window beside it
		t->since = now;
		t->count[RESETS] = t->count[RETRANSMITS] = t->count[TIMEOUTS] = t->count[ATTEMPTS] = t->fired = 0;
	}
	count = __sync_fetch_and_add(&t->count[what], 1) + 1;
	if (kind && count >= least && !(__sync_fetch_and_or(&t->fired, 1 << what) & 1 << what))
		report(kind, &d, t, count, now);
	return 0;
}

SEC("tp_btf/tcp_receive_reset")
int pc_reset(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];

	if (!sk || BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_SYN_SENT)
		return 0; // a refused connect: the breaker's business
	return note(sk, RESETS, POINTCALL_RESETS, resets_min);
}

SEC("tp_btf/tcp_retransmit_skb")
int pc_retransmit(__u64 *ctx)
{
	const struct sock *sk = (const struct sock *)ctx[0];

	if (!sk)
		return 0;
	if (BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_SYN_SENT)
		return note(sk, TIMEOUTS, POINTCALL_CONNECT_SLOW, timeouts_min);
	return note(sk, RETRANSMITS, POINTCALL_RETRANSMITS, retransmits_min);
}

SEC("tp_btf/inet_sock_set_state")
int pc_attempt(__u64 *ctx)
{
	return (int)ctx[2] == TCP_SYN_SENT ? note((const struct sock *)ctx[0], ATTEMPTS, 0, 0) : 0;
}
