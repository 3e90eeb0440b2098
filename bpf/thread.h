/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * Operations of storage that are known by the thread that waits: one at a time, by the address of its task. Included
 * once by an object, after latency.h.
 */
#ifndef POINTCALL_THREAD_H
#define POINTCALL_THREAD_H

static __always_inline __u64 pc_thread(void)
{
	return bpf_get_current_task();
}

/* A thread that is gone waits for nothing. One that lives may wait for something else: the kernel skips a program at
 * the end where another thread was preempted in it on this CPU, and counts that (`recursion_misses`). */
static __always_inline enum pc_answer pc_goes_on(__u64 id, const struct pc_started *started)
{
	struct task_struct *task = (struct task_struct *)id;
	int process = BPF_CORE_READ(task, tgid);

	if (!process || BPF_CORE_READ(task, group_leader, pid) != process)
		return PC_ENDED; /* its memory is something else by now */
	if (BPF_CORE_READ(task, exit_state) || BPF_CORE_READ(task, start_time) > started->at_ns)
		return PC_ENDED;
	return PC_THREAD_LIVES;
}

#endif
