// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// The reflex: a circuit breaker that detects, opens, refuses and probes inside the kernel. User space arms destinations
// and may force, release or close a circuit; it is not on the path. Only armed destinations are ever touched.
//
//   detect   tp_btf/inet_sock_set_state (TCP), tp_btf/inet_sk_error_report (connected UDP)
//   gate     cgroup/connect4, connect6 (TCP and UDP), cgroup/sendmsg4, sendmsg6 (unconnected UDP)
//   command  a `syscall` program, run by user space, so that counters survive and the swap is atomic
//
// Spec: docs/spec/kernel-abi.md. State machine: circuit.h. Pure model: executor/pointcall_executor/core/breaker.py.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define AF_INET         2
#define AF_INET6        10
#define SOCK_STREAM     1
#define SOCK_DGRAM      2
#define IPPROTO_TCP     6
#define IPPROTO_UDP     17
#define IPPROTO_SCTP    132
#define IPPROTO_MPTCP   262
#define ECONNREFUSED    111
#define LOOPBACK4       bpf_htonl(0x7f000001)
#define MAPPED          bpf_htonl(0xffff)
#define MULTICAST       bpf_htonl(0xe0000000)
#define MULTICAST_BITS  bpf_htonl(0xf0000000)
#define BROADCAST       0xffffffff
#define LOOPBACK_BROADCAST bpf_htonl(0x7fffffff)
#define ENOENT          2
#define EINVAL          22
#define EAGAIN          11

// Inputs of the measured code: user space binds their values as policy, next to the blob's digest.
volatile const __u32 threshold = 5;            // failures within the window that open; 1 to 16383
volatile const __u64 window_us = 10000000;
volatile const __u64 cooldown_us = 1000000;    // open time before the first probe
volatile const __u64 cooldown_max_us = 0;      // doubles with each failed probe up to this; 0: does not grow
volatile const __u64 probe_us = 3000000;       // a probe that is silent for so long is taken for lost
volatile const __u32 probe_budget = 1;         // probes in flight at half-open; 1 to 8
volatile const __u32 percent = 0;              // 0: count mode; else failures must also be this share of the results
volatile const __u32 min_attempts = 20;        // with percent: results in the window before the share means anything
volatile const __u32 count_abandoned = 1;      // the application gave up before the kernel did: sk_err 0
volatile const __u32 refuse_errno = 0;         // 0: the application sees EPERM
volatile const __u32 node_wide = 0;            // also look for a circuit with netns 0
volatile const __u64 scope_cgroup = 0;         // results of sockets outside this cgroup decide nothing; 0: all count
volatile const __u32 scope_level = 0;          // depth of scope_cgroup below the root

// Armed destinations. A HASH, never an LRU map: an open circuit must not be evicted. Only user space inserts.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct pointcall_destination);
	__type(value, struct pointcall_circuit);
} circuits SEC(".maps");

// cgroup ids whose connects are never refused (health checkers, the executor itself).
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u64);
	__type(value, __u32);
} allowed SEC(".maps");

// What a detector knows about one finished attempt.
struct result {
	struct pointcall_destination dest;
	__u64 at_ns;
	__u64 cookie;
	__u64 cgroup;
	__u32 error;
	__u32 pad;
};

// ---- common ----------------------------------------------------------------------------------------------------

// A key is written in whole 64-bit words: a lookup that reads wider than what was written stalls the CPU.
static __always_inline void set_key(struct pointcall_destination *d, __u64 head, __u64 tail, __u64 netns, __be16 port,
				    __u8 protocol)
{
	__u64 *words = (__u64 *)d;

	words[0] = head;
	words[1] = tail;
	words[2] = netns;
	words[3] = bpf_ntohs(port) | (__u64)protocol << 16;
}

static __always_inline __u64 join(__be32 first, __be32 second)
{
	return first | (__u64)second << 32;
}

// The circuit of a destination; with `node_wide`, the one of all namespaces where there is none of its own.
static __always_inline struct pointcall_circuit *find(struct pointcall_destination *d)
{
	struct pointcall_circuit *c = bpf_map_lookup_elem(&circuits, d);

	if (c || !node_wide)
		return c;
	d->netns = 0;
	return bpf_map_lookup_elem(&circuits, d);
}

// Microseconds from `then` to `now`, 0 where another CPU's clock reading was taken later than ours.
static __always_inline __u64 age_us(__u64 now, __u64 then)
{
	__u64 age = (now - then) & PC_TIME_MASK;

	return age > PC_TIME_MASK / 2 ? 0 : age;
}

static __always_inline __u64 window_of(const struct pointcall_circuit *c)
{
	return c->window_ms ? c->window_ms * 1000ULL : window_us;
}

static __always_inline __u64 cooldown_of(const struct pointcall_circuit *c, __u64 streak)
{
	__u64 first = c->cooldown_ms ? c->cooldown_ms * 1000ULL : cooldown_us;
	__u64 grown = first << (streak > 17 ? 16 : streak ? streak - 1 : 0);

	if (cooldown_max_us <= first)
		return first;
	return grown < cooldown_max_us ? grown : cooldown_max_us;
}

static __always_inline void emit(__u16 kind, const struct pointcall_destination *d, __u64 at_ns, __u32 pid,
				 __u64 cgroup, __u32 failures, __u32 error)
{
	struct pointcall_event *e = pc_begin(kind, at_ns);

	if (!e)
		return;
	e->pid = pid;
	e->cgroup = cgroup;
	__builtin_memcpy(e->circuit.address, d->address, 16);
	e->circuit.netns = d->netns;
	e->circuit.port = d->port;
	e->circuit.protocol = d->protocol;
	e->circuit.failures = failures;
	e->circuit.error = error;
	pc_send(e);
}

// ---- the gate: runs before routing and before the SYN ------------------------------------------------------------

// Every exchange of this file is tried a few times by calling a sub-program, not by a loop: clang -O2 may lay such a
// loop out with a fall-through back-edge, which the 6.1 verifier refuses.

// 1 = this attempt is a probe. Whoever wins the exchange is; the others are refused.
static __always_inline int take_probe(struct bpf_sock_addr *ctx, struct pointcall_circuit *c,
				      const struct pointcall_destination *d, __u64 w, __u64 now)
{
	__u64 state = PC_STATE(w), streak = PC_STREAK(w), probes = 0, since = now, next;

	if (state == PC_OPEN) {
		if (age_us(now, PC_TIME(w)) < cooldown_of(c, streak))
			return 0;
	} else if (age_us(now, PC_TIME(w)) < probe_us) {
		probes = PC_PROBES(w);
		since = PC_TIME(w);
		if (probes >= probe_budget || probes >= PC_PROBES_MAX)
			return 0;
	}
	next = PC_WORD(PC_HALF, ((probes + 1) << 8) | streak, since);
	if (__sync_val_compare_and_swap(&c->word, w, next) != w)
		return 0;
	// The answer comes later than this store: the probe has not left yet. An MPTCP socket answers through a
	// subflow with another cookie, so there any answer counts.
	c->probe[probes & (PC_PROBES_MAX - 1)] = ctx->protocol == IPPROTO_MPTCP ? 0 : bpf_get_socket_cookie(ctx);
	__sync_fetch_and_add(&c->probes, 1);
	return 1;
}

static __always_inline int refused(struct pointcall_circuit *c, __u64 at_ns)
{
	__u32 code = c->refuse_errno ? c->refuse_errno : refuse_errno;

	__sync_fetch_and_add(&c->refused, 1);
	if (c->t_refused_ns < c->t_open_ns)
		c->t_refused_ns = at_ns;
	if (c->flags & POINTCALL_WATCH_ONLY)
		return 1;
	if (code)
		bpf_set_retval(-(int)(code & 0xfff));
	return 0;
}

// The circuit is not CLOSED. 1 = go on.
static __noinline int decide(struct bpf_sock_addr *ctx, struct pointcall_circuit *c, struct pointcall_destination *d)
{
	if (!c || !d)
		return 1;
	__u64 at_ns = bpf_ktime_get_ns(), now = at_ns / 1000, w = *(volatile __u64 *)&c->word;
	__u64 cgroup = bpf_get_current_cgroup_id();
	__u32 pid = bpf_get_current_pid_tgid() >> 32;

	if (bpf_map_lookup_elem(&allowed, &cgroup))
		return 1;
	switch (PC_STATE(w)) {
	case PC_CLOSED:
		return 1;
	case PC_FORCED:
		if (age_us(PC_TIME(w), now))
			return refused(c, at_ns);
		if (__sync_val_compare_and_swap(&c->word, w, PC_WORD(PC_CLOSED, 0, 0)) == w)
			emit(POINTCALL_CIRCUIT_EXPIRED, d, at_ns, pid, cgroup, 0, 0);
		return 1;
	case PC_HALF:
		// UDP has no success: a probe that stayed without an error is one.
		if (d->protocol == IPPROTO_UDP && age_us(now, PC_TIME(w)) >= probe_us) {
			if (__sync_val_compare_and_swap(&c->word, w, PC_WORD(PC_CLOSED, 0, 0)) == w) {
				__sync_fetch_and_add(&c->closed, 1);
				emit(POINTCALL_CIRCUIT_CLOSED, d, at_ns, pid, cgroup, 0, 0);
			}
			return 1;
		}
	}
	if (!take_probe(ctx, c, d, w, now))
		return refused(c, at_ns);
	emit(POINTCALL_CIRCUIT_HALF_OPEN, d, at_ns, pid, cgroup, PC_STREAK(w), 0);
	return 1;
}

static __always_inline int gate(struct bpf_sock_addr *ctx, __u64 head, __u64 tail)
{
	struct pointcall_destination d;
	struct pointcall_circuit *c;
	__u8 protocol;

	if (ctx->type == SOCK_STREAM && ctx->protocol != IPPROTO_SCTP)
		protocol = IPPROTO_TCP;
	else if (ctx->type == SOCK_DGRAM)
		protocol = IPPROTO_UDP;
	else
		return 1;
	set_key(&d, head, tail, bpf_get_netns_cookie(ctx), ctx->user_port, protocol);
	c = find(&d);
	if (!c || PC_STATE(*(volatile __u64 *)&c->word) == PC_CLOSED)
		return 1;
	return decide(ctx, c, &d);
}

// What 0.0.0.0 means: the address that the socket is bound to, where that can be a source, else 127.0.0.1. The detector
// sees what it became.
static __always_inline __be32 unspecified4(__be32 bound)
{
	if (!bound || (bound & MULTICAST_BITS) == MULTICAST || bound == BROADCAST || bound == LOOPBACK_BROADCAST)
		return LOOPBACK4;
	return bound;
}

static __always_inline int gate4(struct bpf_sock_addr *ctx)
{
	__be32 ip = ctx->user_ip4;

	if (!ip)
		ip = unspecified4(ctx->sk ? ctx->sk->src_ip4 : 0);
	return gate(ctx, 0, join(MAPPED, ip));
}

// :: means ::1, or 127.0.0.1 for a socket that is bound to a v4-mapped address; ::ffff:0.0.0.0 is 0.0.0.0.
static __always_inline int gate6(struct bpf_sock_addr *ctx)
{
	__be32 a0 = ctx->user_ip6[0], a1 = ctx->user_ip6[1], a2 = ctx->user_ip6[2], a3 = ctx->user_ip6[3];
	struct bpf_sock *sk = ctx->sk;

	if (!(a0 | a1) && !a3 && (!a2 || a2 == MAPPED)) {
		int mapped = sk && sk->src_ip6[2] == MAPPED && !(sk->src_ip6[0] | sk->src_ip6[1]);

		if (a2)
			a3 = unspecified4(mapped ? sk->src_ip6[3] : 0);
		else if (mapped)
			a2 = MAPPED, a3 = LOOPBACK4;
		else
			a3 = bpf_htonl(1);
	}
	return gate(ctx, join(a0, a1), join(a2, a3));
}

SEC("cgroup/connect4")
int pc_connect4(struct bpf_sock_addr *ctx)
{
	return gate4(ctx);
}

SEC("cgroup/connect6")
int pc_connect6(struct bpf_sock_addr *ctx)
{
	return gate6(ctx);
}

SEC("cgroup/sendmsg4")
int pc_sendmsg4(struct bpf_sock_addr *ctx)
{
	return gate4(ctx);
}

SEC("cgroup/sendmsg6")
int pc_sendmsg6(struct bpf_sock_addr *ctx)
{
	return gate6(ctx);
}

// ---- the verdict of one attempt ------------------------------------------------------------------------------------

// Did this socket carry one of the probes that `w` counts?
static __always_inline int is_probe(const struct pointcall_circuit *c, __u64 w, __u64 cookie)
{
	__u64 n = PC_PROBES(w);

#pragma unroll
	for (int i = 0; i < PC_PROBES_MAX; i++)
		if (i < n && (c->probe[i] == cookie || !c->probe[i]))
			return 1;
	return 0;
}

// CLOSED -> CLOSED or OPEN: one more failure.
static __always_inline __u64 counted(struct pointcall_circuit *c, __u64 w, __u64 now)
{
	__u32 limit = c->threshold ? c->threshold : threshold, share = c->percent ? c->percent : percent;
	__u32 least = c->min_attempts ? c->min_attempts : min_attempts;
	__u64 n = PC_COUNT(w), fresh = age_us(now, PC_TIME(w)) > window_of(c) || (!n && !share);
	__u64 seen = fresh ? 1 : c->attempts + 1;

	n = fresh ? 1 : n < PC_COUNT_MAX ? n + 1 : n;
	if (n >= limit && (!share || (seen >= least && n * 100 >= seen * share)))
		return PC_WORD(PC_OPEN, 1, now);
	return PC_WORD(PC_CLOSED, n, fresh ? now : PC_TIME(w));
}

// 1 = lost the race, try again.
static __noinline int fail_once(struct pointcall_circuit *c, struct result *r)
{
	if (!c || !r)
		return 0;
	__u64 now = r->at_ns / 1000, w = *(volatile __u64 *)&c->word, next, streak;
	__u32 failures, kind = 0;

	if (PC_STATE(w) == PC_CLOSED) {
		next = counted(c, w, now);
		failures = PC_COUNT(w) + 1;
		if (PC_STATE(next) == PC_OPEN)
			kind = POINTCALL_CIRCUIT_OPENED;
	} else if (PC_STATE(w) == PC_HALF && is_probe(c, w, r->cookie)) {
		streak = PC_STREAK(w);
		next = PC_WORD(PC_OPEN, streak < PC_STREAK_MAX ? streak + 1 : streak, now);
		failures = 1;
		kind = POINTCALL_CIRCUIT_REOPENED;
	} else {
		__sync_fetch_and_add(&c->ignored, 1);
		return 0; // a connect that was already in flight when the circuit opened
	}
	if (__sync_val_compare_and_swap(&c->word, w, next) != w)
		return 1;
	if (!kind) {
		if (PC_TIME(next) != PC_TIME(w))
			c->attempts = 1;
		else
			__sync_fetch_and_add(&c->attempts, 1);
		return 0;
	}
	c->t_seen_ns = r->at_ns;
	c->t_open_ns = bpf_ktime_get_ns();
	__sync_fetch_and_add(&c->opened, 1);
	emit(kind, &r->dest, r->at_ns, 0, r->cgroup, failures, r->error);
	return 0;
}

static __noinline int succeed_once(struct pointcall_circuit *c, struct result *r)
{
	if (!c || !r)
		return 0;
	__u64 now = r->at_ns / 1000, w = *(volatile __u64 *)&c->word;
	__u32 share = c->percent ? c->percent : percent;

	if (PC_STATE(w) == PC_CLOSED && share) {
		if (age_us(now, PC_TIME(w)) <= window_of(c)) {
			__sync_fetch_and_add(&c->attempts, 1);
			return 0;
		}
		if (__sync_val_compare_and_swap(&c->word, w, PC_WORD(PC_CLOSED, 0, now)) != w)
			return 1;
		c->attempts = 1;
	} else if (PC_STATE(w) == PC_CLOSED) {
		return PC_COUNT(w) && __sync_val_compare_and_swap(&c->word, w, PC_WORD(PC_CLOSED, 0, 0)) != w;
	} else if (PC_STATE(w) == PC_HALF && is_probe(c, w, r->cookie)) {
		if (__sync_val_compare_and_swap(&c->word, w, PC_WORD(PC_CLOSED, 0, 0)) != w)
			return 1;
		__sync_fetch_and_add(&c->closed, 1);
		emit(POINTCALL_CIRCUIT_CLOSED, &r->dest, r->at_ns, 0, r->cgroup, 0, 0);
	} else {
		__sync_fetch_and_add(&c->ignored, 1);
	}
	return 0;
}

// The socket's cgroup; 0 outside the scope.
static __always_inline __u64 scope_of(const struct sock *sk)
{
	struct cgroup *cg = sk->sk_cgrp_data.cgroup, *up, **first;
	__u64 id = cg->kn->id;

	if (!scope_cgroup || id == scope_cgroup)
		return id;
	if (!bpf_core_field_exists(cg->ancestors) || cg->level < scope_level)
		return 0;
	first = __builtin_preserve_access_index(&cg->ancestors[0]);
	if (bpf_probe_read_kernel(&up, sizeof up, first + scope_level))
		return 0;
	return BPF_CORE_READ(up, kn, id) == scope_cgroup ? id : 0;
}

// 0: not an internet socket.
static __always_inline int peer_of(const struct sock *sk, struct pointcall_destination *d, __u8 protocol)
{
	const struct sock_common *sc = &sk->__sk_common;
	__u64 head = 0, tail;

	if (sc->skc_family == AF_INET) {
		tail = join(MAPPED, sc->skc_daddr);
	} else if (sc->skc_family == AF_INET6) {
		head = join(sc->skc_v6_daddr.in6_u.u6_addr32[0], sc->skc_v6_daddr.in6_u.u6_addr32[1]);
		tail = join(sc->skc_v6_daddr.in6_u.u6_addr32[2], sc->skc_v6_daddr.in6_u.u6_addr32[3]);
	} else {
		return 0;
	}
	set_key(d, head, tail, sc->skc_net.net->net_cookie, sc->skc_dport, protocol);
	return 1;
}

static __always_inline void on_failure(struct pointcall_circuit *c, struct result *r)
{
	__sync_fetch_and_add(&c->failures, 1);
	if (fail_once(c, r))
		if (fail_once(c, r))
			if (fail_once(c, r))
				fail_once(c, r);
}

static __always_inline void on_success(struct pointcall_circuit *c, struct result *r)
{
	__sync_fetch_and_add(&c->successes, 1);
	if (succeed_once(c, r))
		if (succeed_once(c, r))
			succeed_once(c, r);
}

// Does a connect that the application gave up count as a failure of the destination? One that never got a source port
// is a fault of this node (no free port), not of the destination.
static __always_inline int abandoned_counts(const struct pointcall_circuit *c, const struct sock *sk)
{
	if (c->flags & POINTCALL_ABANDONED_IGNORED)
		return 0;
	if (!count_abandoned && !(c->flags & POINTCALL_ABANDONED_COUNTS))
		return 0;
	return BPF_CORE_READ((struct inet_sock *)sk, inet_sport) != 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(pc_tcp_result, const struct sock *sk, int from, int to)
{
	struct result r;
	struct pointcall_circuit *c;

	if (!sk || from != TCP_SYN_SENT || (to != TCP_CLOSE && to != TCP_ESTABLISHED))
		return 0;
	if (sk->sk_protocol != IPPROTO_TCP || !peer_of(sk, &r.dest, IPPROTO_TCP))
		return 0;
	c = find(&r.dest);
	if (!c)
		return 0;
	// The usual case, kept short: a success of a healthy destination changes nothing, whoever made it.
	if (to == TCP_ESTABLISHED && !*(volatile __u64 *)&c->word && !c->percent && !percent) {
		__sync_fetch_and_add(&c->successes, 1);
		return 0;
	}
	r.at_ns = bpf_ktime_get_ns();
	r.cgroup = scope_of(sk);
	r.cookie = bpf_get_socket_cookie((void *)sk);
	r.error = sk->sk_err;
	r.pad = 0;
	if (!r.cgroup)
		__sync_fetch_and_add(&c->ignored, 1);
	else if (to == TCP_ESTABLISHED)
		on_success(c, &r);
	else if (r.error || abandoned_counts(c, sk))
		on_failure(c, &r);
	else
		__sync_fetch_and_add(&c->ignored, 1);
	return 0;
}

// Connected UDP: an ICMP error came back. TCP reports here as well, early and perhaps twice; its verdict is above.
SEC("tp_btf/inet_sk_error_report")
int BPF_PROG(pc_udp_error, const struct sock *sk)
{
	struct result r;
	struct pointcall_circuit *c;

	if (!sk || sk->sk_protocol != IPPROTO_UDP || !sk->sk_err || !peer_of(sk, &r.dest, IPPROTO_UDP))
		return 0;
	c = find(&r.dest);
	if (!c)
		return 0;
	r.at_ns = bpf_ktime_get_ns();
	r.cgroup = scope_of(sk);
	r.cookie = bpf_get_socket_cookie((void *)sk);
	r.error = sk->sk_err;
	r.pad = 0;
	if (r.cgroup)
		on_failure(c, &r);
	else
		__sync_fetch_and_add(&c->ignored, 1);
	return 0;
}

// ---- commands ------------------------------------------------------------------------------------------------------

static __always_inline __u64 commanded(const struct pointcall_circuit *c, __u32 op, __u64 until_us, __u64 w, __u64 now)
{
	switch (op) {
	case POINTCALL_FORCE:
		return PC_WORD(PC_FORCED, 0, until_us);
	case POINTCALL_CLOSE:
		return PC_WORD(PC_CLOSED, 0, 0);
	case POINTCALL_PROBE_READY:
		if (PC_STATE(w) != PC_OPEN && PC_STATE(w) != PC_HALF)
			return w; // what somebody holds open ends at its time, or by CLOSE
		return PC_WORD(PC_OPEN, PC_STREAK(w), now - cooldown_of(c, PC_STREAK(w)));
	}
	return w;
}

// 0 done, 1 lost the race, -EINVAL unknown.
static __noinline int command_once(struct pointcall_circuit *c, struct pointcall_command *cmd)
{
	if (!c || !cmd)
		return -EINVAL;
	__u64 w = *(volatile __u64 *)&c->word, next;

	if (cmd->op < POINTCALL_FORCE || cmd->op > POINTCALL_CLOSE)
		return -EINVAL;
	next = commanded(c, cmd->op, cmd->until_us, w, bpf_ktime_get_ns() / 1000);
	if (__sync_val_compare_and_swap(&c->word, w, next) != w)
		return 1;
	cmd->before = w;
	cmd->after = next;
	return 0;
}

SEC("syscall")
int pc_command(struct pointcall_command *ctx)
{
	struct pointcall_command cmd = *ctx;
	struct pointcall_circuit *c = bpf_map_lookup_elem(&circuits, &cmd.destination);
	int rc;

	if (!c)
		return -ENOENT;
	rc = command_once(c, &cmd);
	if (rc > 0)
		rc = command_once(c, &cmd);
	if (rc > 0)
		rc = command_once(c, &cmd);
	if (rc > 0)
		rc = command_once(c, &cmd);
	ctx->before = cmd.before;
	ctx->after = cmd.after;
	return rc > 0 ? -EAGAIN : rc;
}
