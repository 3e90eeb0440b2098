// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Faults for a drill, on one cgroup and one destination: connects that are refused, packets that are lost, packets that
// leave later (where the device has the qdisc fq, which keeps the time that is set here). The lease is
// in the kernel: after `until_ns` nothing is injected any more, whoever is left to say so. Chance comes from a seed, so
// a drill can be repeated. Spec: docs/spec/kernel-abi.md section 12.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "circuit.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define MILLION     1000000
#define MAPPED      bpf_htonl(0xffff)
#define LOOPBACK4   bpf_htonl(0x7f000001)

struct fault { /* 120 bytes */
	struct pointcall_destination destination; /* netns 0: any */
	__u64 until_ns;
	__u64 seed;
	__u64 first;          /* inject into the first n attempts; 0: by chance only */
	__u32 refuse_ppm;     /* chance that a connect is refused, parts in a million */
	__u32 refuse_errno;   /* 0: EPERM */
	__u32 loss_ppm;       /* chance that a packet to the destination is lost */
	__u32 delay_us;       /* added to each packet to the destination; 0: none */
	__u64 attempts;       /* connects seen within the lease */
	__u64 refused;
	__u64 packets;
	__u64 lost;
	__u64 after;          /* connects that came after the lease and passed */
	__u64 delayed;        /* packets */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct fault);
} faults SEC(".maps");

static __always_inline struct fault *the_fault(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&faults, &zero);
}

// splitmix64 of the seed and the number of the draw: the same drill draws the same numbers.
static __always_inline int chance(__u64 seed, __u64 number, __u32 ppm)
{
	__u64 z = seed + (number + 1) * 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	z ^= z >> 31;
	return z % MILLION < ppm;
}

static __always_inline int same(const struct fault *f, __u64 head, __u64 tail, __u16 port)
{
	const __u64 *to = (const __u64 *)f->destination.address;

	return to[0] == head && to[1] == tail && f->destination.port == port;
}

static __always_inline int at_connect(struct bpf_sock_addr *ctx, __u64 head, __u64 tail)
{
	struct fault *f = the_fault();
	__u64 number;

	if (!f || !same(f, head, tail, bpf_ntohs(ctx->user_port)))
		return 1;
	if ((ctx->type == SOCK_STREAM ? IPPROTO_TCP : IPPROTO_UDP) != f->destination.protocol)
		return 1;
	if (f->destination.netns && f->destination.netns != bpf_get_netns_cookie(ctx))
		return 1;
	if (bpf_ktime_get_ns() >= f->until_ns) {
		__sync_fetch_and_add(&f->after, 1);
		return 1;
	}
	number = __sync_fetch_and_add(&f->attempts, 1);
	if (f->first ? number >= f->first : !chance(f->seed, number, f->refuse_ppm))
		return 1;
	__sync_fetch_and_add(&f->refused, 1);
	if (f->refuse_errno)
		bpf_set_retval(-(int)(f->refuse_errno & 0xfff));
	return 0;
}

// 0.0.0.0 and :: are where they lead, as at the breaker's gate: the bound address, else loopback.
SEC("cgroup/connect4")
int pc_drill4(struct bpf_sock_addr *ctx)
{
	__be32 ip = ctx->user_ip4;

	if (!ip && ctx->sk)
		ip = ctx->sk->src_ip4;
	return at_connect(ctx, 0, MAPPED | (__u64)(ip ? ip : LOOPBACK4) << 32);
}

SEC("cgroup/connect6")
int pc_drill6(struct bpf_sock_addr *ctx)
{
	__be32 a0 = ctx->user_ip6[0], a1 = ctx->user_ip6[1], a2 = ctx->user_ip6[2], a3 = ctx->user_ip6[3];

	if (!(a0 | a1 | a2 | a3))
		a3 = bpf_htonl(1);
	else if (!(a0 | a1) && a2 == MAPPED && !a3)
		a3 = LOOPBACK4;
	return at_connect(ctx, a0 | (__u64)a1 << 32, a2 | (__u64)a3 << 32);
}

struct packet {
	__u64 head, tail;
	__u16 port;
	__u8 protocol;
};

static __always_inline int read_packet(struct __sk_buff *skb, struct packet *p)
{
	__u64 words[5]; // aligned, for the 64-bit reads below
	__u8 first, *ip = (__u8 *)words;
	__u32 at = 40;
	__be16 port;

	if (bpf_skb_load_bytes(skb, 0, &first, 1))
		return 0;
	if (first >> 4 == 4) {
		if (bpf_skb_load_bytes(skb, 0, ip, 20))
			return 0;
		at = (first & 15) * 4;
		p->protocol = ip[9];
		p->head = 0;
		p->tail = MAPPED | (words[2] & 0xffffffff) << 32;
	} else {
		if (bpf_skb_load_bytes(skb, 0, ip, 40))
			return 0;
		p->protocol = ip[6];
		p->head = words[3];
		p->tail = words[4];
	}
	if (bpf_skb_load_bytes(skb, at + 2, &port, sizeof port))
		return 0;
	p->port = bpf_ntohs(port);
	return 1;
}

SEC("cgroup_skb/egress")
int pc_drill_packet(struct __sk_buff *skb)
{
	struct fault *f = the_fault();
	struct packet p = {};
	__u64 number;

	__u64 now = bpf_ktime_get_ns(), leaves;

	if (!f || !(f->loss_ppm | f->delay_us) || now >= f->until_ns)
		return 1;
	if (!read_packet(skb, &p) || p.protocol != f->destination.protocol || !same(f, p.head, p.tail, p.port))
		return 1;
	number = __sync_fetch_and_add(&f->packets, 1);
	if (chance(f->seed ^ 0x5555555555555555ULL, number, f->loss_ppm)) {
		__sync_fetch_and_add(&f->lost, 1);
		return 0;
	}
	if (f->delay_us) {
		leaves = skb->tstamp > now ? skb->tstamp : now; // TCP may pace already
		skb->tstamp = leaves + f->delay_us * 1000ULL;
		__sync_fetch_and_add(&f->delayed, 1);
	}
	return 1;
}
