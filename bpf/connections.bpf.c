// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Kill established TCP connections to one destination: user space writes the target, then reads the iterator once.
// bpf_sock_destroy came with 6.5; on an older kernel this object does not load, and the action is not offered.
// Spec: docs/spec/kernel-abi.md section 7.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "event.h"
#include "circuit.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define AF_INET  2
#define AF_INET6 10

extern int bpf_sock_destroy(struct sock_common *sk) __ksym;

struct kill_target {
	struct pointcall_destination destination;
	__u64 killed; // since loading
	__u64 failed;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct kill_target);
} target SEC(".maps");

SEC("iter/tcp")
int pc_kill(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct kill_target *t;
	__u32 zero = 0, *want;

	t = bpf_map_lookup_elem(&target, &zero);
	if (!sk || !t || sk->skc_state != TCP_ESTABLISHED || bpf_ntohs(sk->skc_dport) != t->destination.port)
		return 0;
	if (t->destination.netns && sk->skc_net.net->net_cookie != t->destination.netns)
		return 0;
	want = (__u32 *)t->destination.address;
	if (sk->skc_family == AF_INET) {
		if (want[0] | want[1] || want[2] != bpf_htonl(0xffff) || want[3] != sk->skc_daddr)
			return 0;
	} else if (sk->skc_v6_daddr.in6_u.u6_addr32[0] != want[0] || sk->skc_v6_daddr.in6_u.u6_addr32[1] != want[1] ||
		   sk->skc_v6_daddr.in6_u.u6_addr32[2] != want[2] || sk->skc_v6_daddr.in6_u.u6_addr32[3] != want[3]) {
		return 0;
	}
	if (bpf_sock_destroy(sk))
		t->failed++;
	else
		t->killed++;
	return 0;
}
