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
	POINTCALL_CIRCUIT_EXPIRED = 5,  /* FORCED -> CLOSED: its time is over, seen by the next caller */
	POINTCALL_CIRCUIT_STUCK = 6,    /* open or half-open for too long; written by user space, which reads the circuits */
	POINTCALL_OOM_VICTIM = 16,
	POINTCALL_PROCESS_EXIT = 17,
	POINTCALL_RESETS = 24,          /* established connections to a destination were reset, in one window */
	POINTCALL_RETRANSMITS = 25,     /* segments to a destination were sent again, in one window */
	POINTCALL_CONNECT_SLOW = 26,    /* SYNs to a destination were sent again, in one window */
	POINTCALL_STORAGE_SLOW = 32,    /* enough operations were slow in one window, or one was very long */
	POINTCALL_DISK_ERROR = 33,      /* operations failed in one window */
	POINTCALL_SYSCALL_NOVEL = 40,   /* a call that was never made while learning */
	POINTCALL_SYSCALL_ERRORS = 41,  /* too large a share of calls failed in one window */
	POINTCALL_PRESSURE = 48,        /* tasks of a cgroup stalled; written by user space, which the kernel's PSI trigger woke */
};

enum pointcall_operation { /* as Operation in the vocabulary */
	POINTCALL_READ = 0,
	POINTCALL_WRITE = 1,
	POINTCALL_FSYNC = 2,
	POINTCALL_OTHER = 3,
};

enum pointcall_storage_source { /* which object measured it */
	POINTCALL_SOURCE_STORAGE = 0,
	POINTCALL_SOURCE_FUSE = 1,
	POINTCALL_SOURCE_FSYNC = 2,
	POINTCALL_SOURCE_VFS = 3,
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

struct pointcall_transport_event { /* 32 bytes, the first 28 as in a circuit event */
	__u8 address[16];
	__u64 netns;
	__u16 port;
	__u8 protocol;
	__u8 pad;
	__u16 count;      /* resets or segments in this window, 65535: that many or more */
	__u16 attempts;   /* connects that began in this window */
};

struct pointcall_storage_event { /* 32 bytes */
	__u32 device;     /* the kernel's form: major << 20 | minor */
	__u32 operation;  /* enum pointcall_operation */
	__u32 operations; /* in this window */
	__u32 slow;
	__u32 errors;
	__u32 source;     /* enum pointcall_storage_source */
	__u64 longest_ns;
};

struct pointcall_syscall_event { /* 32 bytes */
	__u32 number;     /* of the machine's own table */
	__s32 result;     /* that it returned */
	__u64 errors;     /* in this window */
	__u64 calls;
	__u64 pad;
};

struct pointcall_stuck_event { /* 32 bytes */
	__u8 address[16];
	__u64 open_for_ns;
	__u16 port;
	__u8 protocol;
	__u8 pad;
	__u32 probes;     /* that left meanwhile */
};

struct pointcall_pressure_event { /* 32 bytes */
	__u32 resource;   /* as Resource in the vocabulary: 0 CPU, 1 memory, 2 I/O */
	__u32 pad;
	__u64 stalled_ns; /* in the window */
	__u64 window_ns;
	__u64 pad2;
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
		struct pointcall_transport_event transport;
		struct pointcall_storage_event storage;
		struct pointcall_syscall_event syscall;
		struct pointcall_stuck_event stuck;
		struct pointcall_pressure_event pressure;
	};
};

#endif
