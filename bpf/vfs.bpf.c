// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Slow reads, writes and syncs of regular files on any file system, by trampolines on vfs_read, vfs_write and
// vfs_fsync_range. Only where the kernel grants fentry; no other system call pays. io_uring and page faults on mapped
// files do not pass here. Spec: docs/spec/kernel-abi.md section 8.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"
#define PC_SOURCE POINTCALL_SOURCE_VFS
#include "latency.h"
#include "thread.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define S_IFMT  0170000
#define S_IFREG 0100000
#define EIO 5

// A read there may wait for ever by design: a log that grows, an event that comes. On 6.16 and newer what has no inode
// of its own (eventfd, timerfd, inotify) is a regular file as well.
#define PROC_MAGIC     0x9fa0
#define DEBUGFS_MAGIC  0x64626720
#define SECURITYFS_MAGIC 0x73636673
#define TRACEFS_MAGIC  0x74726163
#define ANON_INODE_MAGIC 0x09041934

static __always_inline int begin(const __u64 *ctx, __u32 operation)
{
	struct inode *inode = BPF_CORE_READ((struct file *)ctx[0], f_inode);
	struct super_block *sb;

	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) != S_IFREG)
		return 0;
	sb = BPF_CORE_READ(inode, i_sb);
	switch (BPF_CORE_READ(sb, s_magic)) {
	case PROC_MAGIC:
	case DEBUGFS_MAGIC:
	case SECURITYFS_MAGIC:
	case TRACEFS_MAGIC:
	case ANON_INODE_MAGIC:
		return 0;
	}
	return pc_latency_begin(pc_thread(), bpf_get_current_cgroup_id(), BPF_CORE_READ(sb, s_dev), operation);
}

static __always_inline int end(const __u64 *ctx)
{
	return pc_latency_end(pc_thread(), (long)ctx[4] == -EIO);
}

SEC("fexit/vfs_read")
int pc_read_exit(__u64 *ctx)
{
	return end(ctx);
}

SEC("fexit/vfs_write")
int pc_write_exit(__u64 *ctx)
{
	return end(ctx);
}

SEC("fexit/vfs_fsync_range")
int pc_fsync_exit(__u64 *ctx)
{
	return end(ctx);
}

SEC("fentry/vfs_read")
int pc_read_enter(__u64 *ctx)
{
	return begin(ctx, POINTCALL_READ);
}

SEC("fentry/vfs_write")
int pc_write_enter(__u64 *ctx)
{
	return begin(ctx, POINTCALL_WRITE);
}

SEC("fentry/vfs_fsync_range")
int pc_fsync_enter(__u64 *ctx)
{
	return begin(ctx, POINTCALL_FSYNC);
}
