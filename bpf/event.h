/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The one ABI between the kernel programs and user space: every ring-buffer record is a `struct pointcall_event` of
 * 56 bytes, so that with the 8-byte ring header a record is 64 bytes and divides the ring. Little-endian host order
 * unless said otherwise. Reader: executor/pointcall_executor/core/event.py; a test compares both layouts.
 */
#ifndef POINTCALL_EVENT_H
#define POINTCALL_EVENT_H

enum pointcall_event_kind {
	POINTCALL_CIRCUIT_OPENED = 1,   /* CLOSED -> OPEN */
	POINTCALL_CIRCUIT_HALF_OPEN = 2,/* OPEN -> HALF: a probe is on its way */
	POINTCALL_CIRCUIT_CLOSED = 3,   /* HALF -> CLOSED: the probe succeeded */
	POINTCALL_CIRCUIT_REOPENED = 4, /* HALF -> OPEN: the probe failed */
	POINTCALL_OOM_VICTIM = 16,
	POINTCALL_PROCESS_EXIT = 17,
};

struct pointcall_circuit_event { /* 32 bytes */
	__u8 address[16]; /* network order, IPv4 as ::ffff:a.b.c.d */
	__u64 netns;      /* network-namespace cookie */
	__u16 port;       /* HOST order */
	__u8 protocol;    /* IPPROTO_TCP = 6, IPPROTO_UDP = 17 */
	__u8 pad;
	__u16 failures;   /* that were counted */
	__u16 error;      /* sk_err of the deciding failure, 0: given up by the application */
};

struct pointcall_process_event { /* 32 bytes */
	__u32 code;       /* exit status as wait(2) has it: low 7 bits = signal, next 8 = status */
	__u32 pad;
	__u64 life_ns;    /* since the process started; for an OOM victim: id of its memory cgroup */
	__u8 comm[16];    /* not trusted: text chosen by the process */
};

struct pointcall_event {
	__u64 at_ns;  /* CLOCK_MONOTONIC when the program was entered */
	__u16 kind;   /* enum pointcall_event_kind */
	__u16 flags;  /* 0 */
	__u32 pid;    /* thread group id of the task concerned, 0 if none */
	__u64 cgroup; /* cgroup v2 id of the task concerned, 0 if none */
	union {
		struct pointcall_circuit_event circuit;
		struct pointcall_process_event process;
	};
};

#endif
