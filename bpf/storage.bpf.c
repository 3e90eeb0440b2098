// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Slow and failing storage, from the kernel's own tracepoints: block requests. Always on: no measurable price, since
// nothing here is on the path of a system call. One event per window and device when enough requests were slow, or one
// was very long; one when requests failed. Histograms stay in the kernel, for whoever asks.
// Not seen: throttling before a request exists (io.max, blkio.throttle), page-cache hits. Spec: docs/spec/kernel-abi.md
// section 8.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"
#include "latency.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

enum { REQ_OP_READ = 0, REQ_OP_WRITE = 1, REQ_OP_FLUSH = 2 };
#define REQ_OP_MASK 0xff

// The v2 cgroup that a request is charged to; 0 where the block controller lives in a v1 tree.
static __always_inline __u64 charged(struct request *rq)
{
	struct cgroup *cg = BPF_CORE_READ(rq, bio, bi_blkg, blkcg, css.cgroup);

	return cg && !BPF_CORE_READ(cg, root, hierarchy_id) ? BPF_CORE_READ(cg, kn, id) : 0;
}

static __always_inline __u32 device_of(struct request *rq)
{
	struct gendisk *disk = BPF_CORE_READ(rq, q, disk);

	return disk ? BPF_CORE_READ(disk, major) << 20 | BPF_CORE_READ(disk, first_minor) : 0;
}

static __always_inline __u32 operation_of(struct request *rq)
{
	__u32 op = BPF_CORE_READ(rq, cmd_flags) & REQ_OP_MASK;

	return op == REQ_OP_READ ? POINTCALL_READ : op == REQ_OP_WRITE ? POINTCALL_WRITE :
	       op == REQ_OP_FLUSH ? POINTCALL_FSYNC : POINTCALL_OTHER;
}

SEC("tp_btf/block_rq_complete")
int pc_rq_complete(__u64 *ctx)
{
	return pc_latency_end(ctx[0], (int)ctx[1] != 0); // blk_status_t or errno: not zero is a failure
}

SEC("tp_btf/block_rq_issue")
int pc_rq_issue(__u64 *ctx)
{
	struct request *rq = (struct request *)ctx[0];
	__u32 device = device_of(rq);

	return device ? pc_latency_begin(ctx[0], charged(rq), device, operation_of(rq)) : 0;
}

// A request is idle when it is free, and when it waits to be issued again, which begins it anew. An end may be missed:
// the kernel skips pc_rq_complete where an interrupt completes a request while it runs on this CPU.
static __always_inline enum pc_answer pc_goes_on(__u64 id, const struct pc_started *started)
{
	struct request *rq = (struct request *)id;

	if (device_of(rq) != started->key.device || operation_of(rq) != started->key.operation)
		return PC_ENDED; // its memory is something else by now
	return BPF_CORE_READ(rq, state) == bpf_core_enum_value(enum mq_rq_state, MQ_RQ_IDLE) ? PC_ENDED : PC_GOES_ON;
}
