// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Slow FUSE file systems, from the tracepoints of FUSE requests (6.12 and newer; on 6.1 this object does not load).
// Always on: no measurable price. Spec: docs/spec/kernel-abi.md section 8.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"
#define PC_SOURCE POINTCALL_SOURCE_FUSE
#include "latency.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

enum { FUSE_READ = 15, FUSE_WRITE = 16, FUSE_FSYNC = 20, FUSE_SETLKW = 33 };

static __always_inline __u32 device_of(struct fuse_req *rq)
{
	return BPF_CORE_READ(rq, fm, sb, s_dev);
}

static __always_inline __u32 operation_of(struct fuse_req *rq)
{
	__u32 op = BPF_CORE_READ(rq, in.h.opcode);

	return op == FUSE_READ ? POINTCALL_READ : op == FUSE_WRITE ? POINTCALL_WRITE :
	       op == FUSE_FSYNC ? POINTCALL_FSYNC : POINTCALL_OTHER;
}

SEC("tp_btf/fuse_request_end")
int pc_fuse_end(__u64 *ctx)
{
	return pc_latency_end(ctx[0], 0);
}

// Runs in the task that asks: its cgroup is known here. Waiting for a lock is no slow storage, and what has no file
// system is a character device (CUSE).
SEC("tp_btf/fuse_request_send")
int pc_fuse_send(__u64 *ctx)
{
	struct fuse_req *rq = (struct fuse_req *)ctx[0];
	__u32 device;

	if (!rq)
		return 0;
	device = device_of(rq);
	if (!device || BPF_CORE_READ(rq, in.h.opcode) == FUSE_SETLKW)
		return 0;
	return pc_latency_begin(ctx[0], bpf_get_current_cgroup_id(), device, operation_of(rq));
}

// No tracepoint tells the end of a request whose caller was killed before the server had read it. Nobody refers to it
// then, and its memory is free or another request, which begins anew.
static __always_inline enum pc_answer pc_goes_on(__u64 id, const struct pc_started *started)
{
	struct fuse_req *rq = (struct fuse_req *)id;

	if (device_of(rq) != started->key.device || operation_of(rq) != started->key.operation)
		return PC_ENDED; // its memory is something else by now
	return BPF_CORE_READ(rq, count.refs.counter) > 0 ? PC_GOES_ON : PC_ENDED;
}
