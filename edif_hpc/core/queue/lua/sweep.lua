-- Take requests back from workers that no longer renew, and end those that waited too long. Returns {reclaimed, dead, overdue, next}.
-- After a silence (Redis or every sweeper was away) nothing is reclaimed until each worker had time to renew.
-- The last number of the answer: in how many ms the next lease ends, or -1.
-- ARGV: settling_ms, interval_ms, attempts, retention_ms, queue_ms, limit
local settling, interval, attempts = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local retention, patience, limit = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local now = now_ms()
local last = tonumber(redis.call('HGET', SWEEP, 'last') or '0')
redis.call('HSET', SWEEP, 'last', now)
if now - last > 3 * interval then redis.call('HSET', SWEEP, 'hold_until', now + settling) end

local reclaimed, dead, overdue = 0, 0, 0
local hold = tonumber(redis.call('HGET', SWEEP, 'hold_until') or '0')
if now >= hold then
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', now, 'LIMIT', 0, limit)) do
    local f = fields(id, 'state', 'worker', 'cancel')
    if f[1] ~= 'claimed' then
      redis.call('ZREM', LEASES, id)
    elseif f[3] then
      settle(id, now, 'ERROR', f[3], '', '', retention)
    else
      local cause = 'the worker ' .. f[2] .. ' stopped answering'
      if redis.call('HINCRBY', k_request(id), 'losses', 1) >= attempts then
        bury(id, now, attempts, cause, retention)
        dead = dead + 1
      else
        give_back(id, now, 'Back in the queue: ' .. cause .. '.')
        reclaimed = reclaimed + 1
      end
    end
  end
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', WAITING_SINCE, '-inf', now - patience, 'LIMIT', 0, limit)) do
  local f = fields(id, 'state', 'target', 'priority', 'user')
  if f[1] == 'waiting' and dequeue(id, f[2], f[3], f[4]) then
    settle(id, now, 'ERROR', 'No worker took the request within ' .. math.floor(patience / 1000) .. ' s; submit it again.', '', '', retention)
    overdue = overdue + 1
  else
    redis.call('ZREM', WAITING_SINCE, id)
  end
end
bump('reclaimed', reclaimed)
local first = redis.call('ZRANGE', LEASES, 0, 0, 'WITHSCORES')
return {reclaimed, dead, overdue, first[2] and math.max(0, math.ceil(math.max(tonumber(first[2]), hold) - now)) or -1}
