// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Slow fsync and fdatasync on ext4, whatever the cause: also throttling, which the block tracepoints do not see. Where
// ext4 is a module, it must be loaded first: the tracepoints are in its BTF. Spec: docs/spec/kernel-abi.md section 8.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"
#define PC_SOURCE POINTCALL_SOURCE_FSYNC
#include "latency.h"
#include "thread.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("tp_btf/ext4_sync_file_exit")
int pc_sync_exit(__u64 *ctx)
{
	return pc_latency_end(pc_thread(), (int)ctx[1] != 0);
}

SEC("tp_btf/ext4_sync_file_enter")
int pc_sync_enter(__u64 *ctx)
{
	struct file *file = (struct file *)ctx[0];

	if (!file)
		return 0;
	return pc_latency_begin(pc_thread(), bpf_get_current_cgroup_id(), BPF_CORE_READ(file, f_inode, i_sb, s_dev),
				POINTCALL_FSYNC);
}
