//! The timeline in Chrome's trace event format, which ui.perfetto.dev opens.

use serde_json::{Value, json};

use super::StepProfile;
use crate::profile::Span;

impl StepProfile {
    /// `trace.json`: a complete event for each span, in microseconds. Spans lie within others as their times do.
    #[must_use]
    pub fn trace(&self) -> String {
        let name = |what, name: &str| json!({"ph": "M", "name": what, "pid": 1, "tid": 1, "args": {"name": name}});
        let mut events = vec![name("process_name", "pixmim"), name("thread_name", &self.device)];
        events.extend(self.profile.spans().map(|span| event(&span)));
        let trace = json!({
            "displayTimeUnit": "ms",
            "otherData": {"summary": self.summary(), "version": crate::VERSION},
            "traceEvents": events,
        });
        trace.to_string()
    }
}

fn event(span: &Span) -> Value {
    let microseconds = |time: std::time::Duration| 1e6 * time.as_secs_f64();
    let (category, args) = match span.cost {
        Some(cost) => {
            let per_second = |amount: u64| amount as f64 / span.took().as_secs_f64().max(1e-9);
            let args = json!({
                "bytes": cost.bytes,
                "flops": cost.flops,
                "GB/s": per_second(cost.bytes) / 1e9,
                "TFLOP/s": per_second(cost.flops) / 1e12,
            });
            ("op", args)
        }
        None => ("stage", json!({})),
    };
    json!({
        "ph": "X",
        "name": span_name(span),
        "cat": category,
        "pid": 1,
        "tid": 1,
        "ts": microseconds(span.begin),
        "dur": microseconds(span.took()),
        "args": args,
    })
}

/// With its number, if it is one of several.
pub(super) fn span_name(span: &Span) -> String {
    match span.index {
        Some(index) => format!("{} {index}", span.name),
        None => span.name.into(),
    }
}
