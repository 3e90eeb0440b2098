// The runbook `disk-error` in its simplest form, in AssemblyScript: one handler, two actions, no memory.
//
//   asc disk.ts -o disk.wasm -O2 --runtime stub --noExportMemory --use abort=
//   Without `-O2` a memory stays that nobody uses; pointcall_runbook.adopt.adopt(raw) would drop it.
//
// Arguments are the fields of DiskError in the order of `pointcall explain DiskError`, all i64. This compiler proves no
// ranges: the host checks every argument of every action on every run.

// @ts-ignore: decorator
@external("rb1", "notify")
declare function notify(channel: i64, level: i64, code: i64): void;
// @ts-ignore: decorator
@external("rb1", "escalate")
declare function escalate(channel: i64, code: i64): void;

const OPS: i64 = 1044584127; // the number of the channel "ops": sha256("pointcall/channel/v1\0ops"), 31 bits
const CRITICAL: i64 = 4;

export function decide_DiskError(at: i64, device: i64, errors: i64, service: i64): void {
  if (service == 0) {
    if (errors > 4) escalate(OPS, errors);
    return;
  }
  notify(OPS, CRITICAL, errors);
}
