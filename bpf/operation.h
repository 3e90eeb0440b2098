/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * What user space reads of operations of storage, and what it asks. Reader: executor/pointcall_executor/kernel/storage.py;
 * a test compares both layouts.
 */
#ifndef POINTCALL_OPERATION_H
#define POINTCALL_OPERATION_H

#define PC_BUCKETS 32

struct pc_latency_key { /* 16 bytes */
	__u64 cgroup;
	__u32 device; /* the kernel's form: major << 20 | minor */
	__u32 operation; /* enum pointcall_operation */
};

struct pc_latency { /* 312 bytes */
	__u64 since;
	__u64 count;   /* in this window */
	__u64 slow;
	__u64 longest;
	__u64 errors;
	__u64 fired;   /* bit 0: slow was reported in this window, bit 1: errors were */
	__u64 total;   /* never reset while the entry lives */
	__u64 bucket[PC_BUCKETS]; /* log2 of microseconds (1,024 ns), as long as `total` */
};

struct pc_started { /* 24 bytes */
	__u64 at_ns;
	struct pc_latency_key key; /* cgroup: of the one who asked, 0 where it is not known */
};

struct pc_question { /* 16 bytes: does this operation still go on? */
	__u64 id;    /* its key in `in_flight` */
	__u64 at_ns; /* when it began */
};

enum pc_answer {
	PC_ENDED = 0,        /* it is not in `in_flight` any more */
	PC_GOES_ON = 1,
	PC_THREAD_LIVES = 2, /* nothing else is known about it */
};

#endif
