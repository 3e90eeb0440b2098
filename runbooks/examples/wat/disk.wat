;; A handler written by hand: call a person (channel "ops" is 1044584127) for a device with errors. `pointcall explain DiskError` lists the fields.
(module
  (import "rb1" "escalate" (func $escalate (param i64 i64)))
  (func (export "decide_DiskError") (param $at i64) (param $device i64) (param $errors i64) (param $service i64)
    (if (i64.ge_s (local.get $errors) (i64.const 5))
      (then (call $escalate (i64.const 1044584127) (local.get $errors))))))
