/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * A circuit: its key, its one-word state, its counters, and the command that user space sends to change it. Reader:
 * executor/pointcall_executor/kernel/breaker.py; the pure model of the word is core/breaker.py. Spec:
 * docs/spec/kernel-abi.md.
 */
#ifndef POINTCALL_CIRCUIT_H
#define POINTCALL_CIRCUIT_H

/* The whole state is one word, changed only by compare-and-swap:
 *   bits 63..62 state | bits 61..48 count | bits 47..0 time in microseconds (CLOCK_MONOTONIC, wraps after 8.9 years)
 *
 *   state   time              count
 *   CLOSED  first failure     failures in this window
 *   OPEN    opened            openings in a row (low 8 bits)
 *   HALF    the probe left    openings in a row (low 8 bits), probes that left (high 6 bits)
 *   FORCED  EXPIRES           0
 */
#define PC_CLOSED 0ULL
#define PC_OPEN   1ULL
#define PC_HALF   2ULL
#define PC_FORCED 3ULL

#define PC_TIME_MASK  ((1ULL << 48) - 1)
#define PC_COUNT_MAX  0x3fffULL
#define PC_STREAK_MAX 0xffULL
#define PC_PROBES_MAX 8

#define PC_WORD(state, count, us) (((__u64)(state) << 62) | ((__u64)(count) << 48) | ((us) & PC_TIME_MASK))
#define PC_STATE(w)  ((w) >> 62)
#define PC_COUNT(w)  (((w) >> 48) & PC_COUNT_MAX)
#define PC_TIME(w)   ((w) & PC_TIME_MASK)
#define PC_STREAK(w) (PC_COUNT(w) & PC_STREAK_MAX)
#define PC_PROBES(w) (PC_COUNT(w) >> 8)

struct pointcall_destination { /* 32 bytes, no holes: a key with holes never matches */
	__u8 address[16]; /* network order, IPv4 as ::ffff:a.b.c.d */
	__u64 netns;      /* network-namespace cookie; 0: the node-wide circuit */
	__u16 port;       /* HOST order */
	__u8 protocol;    /* IPPROTO_TCP = 6, IPPROTO_UDP = 17 */
	__u8 pad[5];
};

struct pointcall_circuit { /* 192 bytes */
	__u64 word;
	__u64 probe[PC_PROBES_MAX]; /* socket cookies of the probes that left; 0: any answer counts */
	__u64 attempts;   /* results seen in this window, for the error rate */
	__u64 t_seen_ns;  /* program entry for the failure that opened it last */
	__u64 t_open_ns;  /* after the swap that opened it last */
	__u64 t_refused_ns; /* the first refusal after that */
	__u64 failures;   /* counters, never reset */
	__u64 successes;
	__u64 opened;     /* CLOSED or HALF -> OPEN */
	__u64 refused;
	__u64 probes;
	__u64 closed;     /* HALF -> CLOSED */
	__u64 ignored;    /* results that decided nothing: local faults, late answers, other cgroups */
	__u32 threshold;  /* this destination's own values; 0: the object's constant */
	__u32 percent;
	__u32 refuse_errno;
	__u32 flags;      /* enum pointcall_circuit_flag */
	__u32 window_ms;
	__u32 cooldown_ms;
	__u32 min_attempts;
	__u32 pad;
};

enum pointcall_circuit_flag {
	POINTCALL_ABANDONED_COUNTS = 1, /* overrides the constant `count_abandoned` to yes */
	POINTCALL_ABANDONED_IGNORED = 2,/* overrides it to no */
	POINTCALL_WATCH_ONLY = 4,       /* mode `monitor`: count, open, report, refuse nothing */
};

enum pointcall_command_op {
	POINTCALL_FORCE = 1,       /* any -> FORCED until `until_us` */
	POINTCALL_PROBE_READY = 2, /* OPEN, HALF -> OPEN with its cool-down over: the next connect is the probe */
	POINTCALL_CLOSE = 3,       /* any -> CLOSED */
};

struct pointcall_command { /* 64 bytes: context of the `syscall` program, copied back when it returns */
	struct pointcall_destination destination;
	__u64 until_us; /* in */
	__u64 before;   /* out: the word that was replaced */
	__u64 after;    /* out */
	__u32 op;       /* in: enum pointcall_command_op */
	__u32 pad;
};

struct pointcall_counters { /* 16 bytes, one per object */
	__u64 events; /* records that reached the ring */
	__u64 lost;   /* records that found it full */
};

#endif
