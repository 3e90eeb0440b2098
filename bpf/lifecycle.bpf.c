// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Processes of watched cgroups: chosen by the OOM killer, or a main thread that ended with a signal or a non-zero
// status. Everything else stays silent, so the ring is quiet. Spec: docs/spec/kernel-abi.md.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "event.h"
#include "circuit.h"
#include "ring.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

// cgroup v2 ids; only user space inserts. A cgroup below a watched one is watched by its own id.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u32);
} watched SEC(".maps");

// The cgroup in the v2 tree; on a hybrid host the memory controller's is another one, and most tasks are in the root.
static __always_inline __u64 watched_cgroup(struct task_struct *t)
{
	__u64 id = BPF_CORE_READ(t, cgroups, dfl_cgrp, kn, id);

	return bpf_map_lookup_elem(&watched, &id) ? id : 0;
}

static __always_inline struct pointcall_event *begin(struct task_struct *t, __u16 kind)
{
	__u64 cgroup = watched_cgroup(t);
	struct pointcall_event *e;

	if (!cgroup)
		return 0;
	e = pc_begin(kind, bpf_ktime_get_ns());
	if (!e)
		return 0;
	e->pid = BPF_CORE_READ(t, tgid);
	e->cgroup = cgroup;
	BPF_CORE_READ_STR_INTO(&e->process.comm, t, comm);
	return e;
}

// The task's cgroup in the memory controller's tree (v1 or v2). Which slot is the controller's differs between kernels.
static __always_inline __u64 memory_cgroup(struct task_struct *t)
{
	struct css_set *set = BPF_CORE_READ(t, cgroups);
	struct cgroup_subsys_state *css = 0, **first = __builtin_preserve_access_index(&set->subsys[0]);

	bpf_probe_read_kernel(&css, sizeof css, first + bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id));
	return BPF_CORE_READ(css, cgroup, kn, id);
}

SEC("tp_btf/mark_victim")
int BPF_PROG(pc_oom_victim, struct task_struct *t)
{
	struct pointcall_event *e = t ? begin(t, POINTCALL_OOM_VICTIM) : 0;

	if (!e)
		return 0;
	e->process.life_ns = memory_cgroup(t);
	pc_send(e);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(pc_task_exit, struct task_struct *t)
{
	struct pointcall_event *e;

	if (!t || t->pid != t->tgid || !t->exit_code)
		return 0;
	e = begin(t, POINTCALL_PROCESS_EXIT);
	if (!e)
		return 0;
	e->process.code = t->exit_code;
	e->process.life_ns = e->at_ns - BPF_CORE_READ(t, group_leader, start_time);
	pc_send(e);
	return 0;
}
