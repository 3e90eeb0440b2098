/* The runbook `refusing-dependency` in its simplest form, in C: one handler, two actions, no memory.
 *
 *   clang --target=wasm32 -O2 -nostdlib -Wl,--no-entry -Wl,--strip-all -Wl,--compress-relocations -o recreate.raw.wasm recreate.c
 *   pointcall_runbook.adopt.adopt(raw) drops the memory that the linker adds; then `pointcall inspect recreate.wasm`
 *
 * Arguments are the fields of CircuitOpened in the order of `pointcall explain CircuitOpened`; an address takes two.
 * The compiler of this file proves no ranges: the host checks every argument of every action on every run.
 */
typedef long long i64;
#define ACTION(name) __attribute__((import_module("rb1"), import_name(#name))) extern void name

ACTION(recreate)(i64 service, i64 grace_ns);
ACTION(notify)(i64 channel, i64 level, i64 code);

#define OPS 1044584127LL /* the number of the channel "ops": sha256("pointcall/channel/v1\0ops"), 31 bits */
#define WARNING 2

__attribute__((export_name("decide_CircuitOpened"))) void
decide(i64 at, i64 address_high, i64 address_low, i64 port, i64 failures, i64 reopened, i64 opens, i64 service,
       i64 restarts)
{
	i64 grace = 1000000000LL << (restarts < 5 ? restarts : 5);

	if (service == 0 || restarts >= 10) {
		notify(OPS, WARNING, restarts);
		return;
	}
	for (int step = 0; step < 3; step++) /* a constant count: unrolled by the optimiser */
		if (opens > step * 10)
			grace += step * 1000000LL;
	recreate(service, grace);
}
