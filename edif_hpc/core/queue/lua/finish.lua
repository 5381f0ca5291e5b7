-- The terminal status of an attempt. Returns 1 (written, now or before by this same attempt) or 0 (not the current one).
-- ARGV: id, token, status, description, data, meta, retention_ms, run_ms, object, result, log_lines, then seq, status,
-- description of each event before it that is not written yet
local id, token, status, description, data, meta = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local retention, ran, object, result = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10]
local LEARN = 0.3  -- weight of the newest run in the learnt time
local f = fields(id, 'token', 'state', 'target', 'user', 'kind', 'charged', 'finished_by', 'seq')
if f[2] == 'done' and f[7] == token then return 1 end
if f[1] ~= token or f[2] ~= 'claimed' then return 0 end
local now = now_ms()
report(id, now, tonumber(f[8] or '0'), 11, false)
if result ~= '' then redis.call('SET', k_result(id), result, 'PX', retention) end
if object ~= '' then redis.call('ZADD', OBJECTS, now + retention, object) end
if ran >= 0 then
  set_virtual_time(f[3], f[4], virtual_time(f[3], f[4]) - tonumber(f[6] or '0') + ran)
  if status == 'COMPLETED' then
    local known = redis.call('HGET', k_estimates(f[3]), f[5])
    local learnt = known and (known * (1 - LEARN) + ran * LEARN) or ran
    redis.call('HSET', k_estimates(f[3]), f[5], learnt)
    redis.call('EXPIRE', k_estimates(f[3]), SHARE_TTL)
    redis.call('HINCRBY', COUNTERS, 'run_ms', math.floor(ran))
  end
end
redis.call('HSET', k_request(id), 'finished_by', token)
settle(id, now, status, description, data, meta, retention)
return 1
