// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Nobody but the executor may swap the program behind a BPF link or take a link off, while this is loaded. An LSM
// program: only where the kernel grants it, and only as strong as root is weak otherwise. Spec: docs/spec/kernel-abi.md
// section 11.
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "circuit.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define EPERM 1
enum { LINK_UPDATE = 29, LINK_DETACH = 34 }; // enum bpf_cmd

volatile const __u32 executor = 0; // thread group id that may

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} denied SEC(".maps");

SEC("lsm/bpf")
int pc_tamper(__u64 *ctx)
{
	__u32 zero = 0;
	__u64 *n;

	if ((int)ctx[0] != LINK_UPDATE && (int)ctx[0] != LINK_DETACH)
		return 0;
	if (bpf_get_current_pid_tgid() >> 32 == executor)
		return 0;
	n = bpf_map_lookup_elem(&denied, &zero);
	if (n)
		__sync_fetch_and_add(n, 1);
	return -EPERM;
}
