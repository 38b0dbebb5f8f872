-- For wrk: posts transactions of a file, each with an id of its own; time goes on when the file begins again.
-- wrk ... -- FILE BEGIN KEY RUN, where a line of FILE is a time in seconds, a tab and the rest of the transaction as JSON, BEGIN is how many were sent before, and RUN begins each id.
local lines, period, sent, key, run = {}, 0, 0, "", ""

function init(args)
  sent, key, run = tonumber(args[2]), args[3], args[4]
  local first, last
  for line in io.lines(args[1]) do
    local time, rest = line:match("^(%d+)\t(.+)$")
    first, last = first or tonumber(time), tonumber(time)
    lines[#lines + 1] = { time = last, rest = rest }
  end
  period = last - first + 1
end

function request()
  local line = lines[sent % #lines + 1]
  local time = line.time + math.floor(sent / #lines) * period
  sent = sent + 1
  local body = string.format('{"transaction_id":"%s-%d","time":%d,%s', run, sent, time, line.rest)
  return wrk.format("POST", "/predict", { ["Host"] = "localhost", ["Content-Type"] = "application/json", ["X-API-Key"] = key }, body)
end

function done(summary, latency)
  local e = summary.errors
  print(string.format('{"requests":%d,"seconds":%f,"p50":%d,"p99":%d,"failed":%d}', summary.requests, summary.duration / 1e6,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
