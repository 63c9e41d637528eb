//! When a stream reached marks in its work.

use std::sync::Arc;
use std::time::Duration;

use super::Inner;
use super::handles::Event;
use crate::Result;
use crate::cuda::driver::Clock;

/// An event for each mark.
#[derive(Debug)]
pub(super) struct EventClock {
    events: Vec<Event>,
    gpu: Arc<Inner>,
}

impl EventClock {
    pub(super) fn new(gpu: Arc<Inner>) -> Self {
        Self { events: Vec::new(), gpu }
    }
}

impl Clock for EventClock {
    fn mark(&mut self) -> Result<()> {
        self.gpu.bind()?;
        // An event that is captured never tells the time.
        self.gpu.expect_no_capture("time its work")?;
        let event = Event::timed()?;
        event.record(&self.gpu.stream).map_err(|error| self.gpu.blame(error))?;
        self.events.push(event);
        Ok(())
    }

    fn read(&mut self) -> Result<Vec<Duration>> {
        self.gpu.bind()?;
        self.gpu.finish()?;
        let since_first = |event: &Event| {
            let milliseconds = event.milliseconds_since(&self.events[0])?;
            Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
        };
        self.events.iter().map(since_first).collect()
    }
}

impl Drop for EventClock {
    fn drop(&mut self) {
        // Where the events are destroyed their context must be current.
        let _ = self.gpu.bind();
    }
}
