// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Isolation: all IP traffic of one cgroup and everything below it is refused until a deadline. The programs are attached
// to that cgroup only, so nobody else pays. The deadline is in the kernel: after it everything passes again, whoever is
// left to say so. Loopback is no exception. Spec: docs/spec/kernel-abi.md section 13.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include "circuit.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct isolation { /* 32 bytes */
	__u64 until_ns; /* CLOCK_MONOTONIC; 0: not isolated */
	__u64 calls;    /* connects and sends refused */
	__u64 out;      /* packets dropped, leaving */
	__u64 in;       /* packets dropped, arriving */
};

// One value for each cgroup that these programs are attached to, whichever of them asks; the key is the cgroup's id.
struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_STORAGE);
	__type(key, __u64);
	__type(value, struct isolation);
} isolations SEC(".maps");

static __always_inline int isolated(const struct isolation *i)
{
	return i->until_ns && bpf_ktime_get_ns() < i->until_ns;
}

static __always_inline int call(void)
{
	struct isolation *i = bpf_get_local_storage(&isolations, 0);

	if (!isolated(i))
		return 1;
	__sync_fetch_and_add(&i->calls, 1);
	return 0;
}

SEC("cgroup/connect4")
int pc_iso_connect4(struct bpf_sock_addr *ctx)
{
	return call();
}

SEC("cgroup/connect6")
int pc_iso_connect6(struct bpf_sock_addr *ctx)
{
	return call();
}

SEC("cgroup/sendmsg4")
int pc_iso_send4(struct bpf_sock_addr *ctx)
{
	return call();
}

SEC("cgroup/sendmsg6")
int pc_iso_send6(struct bpf_sock_addr *ctx)
{
	return call();
}

SEC("cgroup_skb/egress")
int pc_iso_egress(struct __sk_buff *skb)
{
	struct isolation *i = bpf_get_local_storage(&isolations, 0);

	if (!isolated(i))
		return 1;
	__sync_fetch_and_add(&i->out, 1);
	return 0;
}

SEC("cgroup_skb/ingress")
int pc_iso_ingress(struct __sk_buff *skb)
{
	struct isolation *i = bpf_get_local_storage(&isolations, 0);

	if (!isolated(i))
		return 1;
	__sync_fetch_and_add(&i->in, 1);
	return 0;
}
