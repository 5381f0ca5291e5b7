-- Hand the next request that fits to a worker. Returns nil, or {id, target, attempt, record, payload or '', object, kind, expected_ms, submitted}.
-- ARGV: worker, token, lease_ms, remaining_ms, aging_ms, target...
local worker, token = ARGV[1], ARGV[2]
local lease, remaining, aging = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local LOOK_AHEAD = 8  -- requests of one user that are looked at for one that fits the remaining time
local now = now_ms()

-- The first request in a user's line that fits into what remains of the walltime.
local function fitting(target, priority, user)
  for _, id in ipairs(redis.call('LRANGE', k_line(target, priority, user), 0, LOOK_AHEAD - 1)) do
    local f = fields(id, 'kind', 'declared')
    local expected = estimate(target, f[1], tonumber(f[2] or '0'))
    if expected <= remaining then return id, expected end
  end
end

-- Priority first, and a request that waited `aging` ms for each step competes as an equal; then fair share.
local function choose(target)
  local best
  local top
  for priority = PRIORITIES - 1, 0, -1 do
    local waiting = redis.call('ZRANGE', k_waiting(target, priority), 0, -1, 'WITHSCORES')
    for i = 1, #waiting, 2 do
      local user, vtime = waiting[i], tonumber(waiting[i + 1])
      if best == nil or vtime < best.vtime then
        local id, expected = fitting(target, priority, user)
        if id then
          top = top or priority
          local waited = now - tonumber(redis.call('HGET', k_request(id), 'submitted'))
          if priority == top or waited >= (top - priority) * aging then
            best = {id = id, user = user, priority = priority, vtime = vtime, expected = expected}
          end
        end
      end
    end
  end
  return best
end

for i = 6, #ARGV do
  local target = ARGV[i]
  local best = redis.call('ZSCORE', TARGETS, target) and choose(target)
  if best then
    local id = best.id
    dequeue(id, target, best.priority, best.user)
    redis.call('HSET', k_share(target), CLOCK, best.vtime)
    set_virtual_time(target, best.user, best.vtime + best.expected)
    local attempt = redis.call('HINCRBY', k_request(id), 'attempt', 1)
    redis.call('HSET', k_request(id), 'state', 'claimed', 'token', token, 'worker', worker, 'seq', 0,
      'charged', best.expected, 'claimed', now)
    redis.call('ZADD', LEASES, now + lease, id)
    redis.call('ZADD', k_running(target), now + best.expected, id)
    emit(id, now, 'DISPATCHED', attempt == 1 and 'Handed to a worker.' or ('Handed to a worker, attempt ' .. attempt .. '.'))
    bump('claims')
    local f = fields(id, 'record', 'object', 'kind', 'submitted', 'user')
    local payload = redis.call('GET', k_payload(id))
    return {id, target, attempt, f[1], payload or '', f[2], f[3], best.expected, f[4], f[5]}
  end
end
return nil
